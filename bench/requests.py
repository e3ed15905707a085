"""The requests of the load: a chat request of about 1 KiB with the head of the official SDK."""

import json
from pathlib import Path

SDK_HEAD = """\
POST /v1/chat/completions HTTP/1.1
Host: {host}
Accept-Encoding: gzip, deflate
Connection: keep-alive
Accept: application/json
Content-Type: application/json
User-Agent: OpenAI/Python 2.6.1
X-Stainless-Lang: python
X-Stainless-Package-Version: 2.6.1
X-Stainless-OS: Linux
X-Stainless-Arch: x64
X-Stainless-Runtime: CPython
X-Stainless-Runtime-Version: 3.11.2
Authorization: Bearer {key}
X-Stainless-Async: async:asyncio
x-stainless-retry-count: 0
x-stainless-read-timeout: 600
Content-Length: {length}

"""
SMALL_HEAD = """\
POST /v1/chat/completions HTTP/1.1
Host: {host}
User-Agent: curl/8.5.0
Accept: */*
Authorization: Bearer {key}
Content-Type: application/json
Content-Length: {length}

"""
HEADS = {"sdk": SDK_HEAD, "small": SMALL_HEAD}
QUESTION = (
    "Our service runs in three regions, each with its own mix of accelerators, and the traffic moves with the sun. "
    "Explain step by step how a gateway should spread chat requests over them, when it should spill from the first "
    "region to the second, and what it has to keep in mind for answers that are already half-way out. "
)


def body(stream_events: int = 0, interval_us: int = 0) -> bytes:
    """A chat request of about 1 KiB, streamed if `stream_events` is set.

    Shape: the mock reads the number of events from `max_tokens` and the pause between two from `seed`.
    """
    value: dict[str, object] = {
        "messages": [
            {"role": "system", "content": "You are a careful engineer. Answer briefly and say what you do not know."},
            {"role": "user", "content": (QUESTION * 3)[:760]},
        ],
        "model": "bench-model",
        "max_tokens": stream_events or 32,
        "temperature": 0.7,
    }
    if stream_events:
        value |= {"seed": interval_us, "stream": True}
    return json.dumps(value, separators=(",", ":")).encode()


def write_request(path: Path, head: str, port: int, key: str, content: bytes) -> Path:
    """Write one whole request, head and body, for the load client."""
    text = HEADS[head].format(host=f"127.0.0.1:{port}", key=key, length=len(content)).replace("\n", "\r\n")
    path.write_bytes(text.encode() + content)
    return path
