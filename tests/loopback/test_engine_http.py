"""The simulated engine as an HTTP server: framing, pipelining, closing, bad input, the command line."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.loopback.engines import engine, metric


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """An engine that responds at once."""
    with engine("--prefill-tokens-per-s", "0", "--decode-base-s", "0") as url:
        yield url


def dial(base_url: str) -> socket.socket:
    """A connection to an engine."""
    host, port = base_url.removeprefix("http://").removesuffix("/v1").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def post(prompt: str, *extra: str, stream: bool = False) -> bytes:
    """A request with a response of one token."""
    body = json.dumps({"model": "sim", "prompt": prompt, "max_tokens": 1, "stream": stream}).encode()
    head = ["POST /v1/completions HTTP/1.1", "host: e", f"content-length: {len(body)}", *extra]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def test_pipelined_requests_are_served_in_order(base_url: str) -> None:
    prompts = [f"prompt {index}" for index in range(20)]
    alone = []
    for prompt in prompts:
        with dial(base_url) as connection:
            connection.sendall(post(prompt, "connection: close"))
            alone.append(json.loads(read_all(connection).partition(b"\r\n\r\n")[2])["choices"][0]["text"])
    with dial(base_url) as connection:
        last = post(prompts[-1], "connection: close")
        connection.sendall(
            b"".join(post(prompt, stream=index % 3 == 0) for index, prompt in enumerate(prompts[:-1])) + last
        )
        responses = read_all(connection).split(b"HTTP/1.1 200 OK")[1:]
    assert len(responses) == 20
    assert all(json.dumps(text).encode() in response for text, response in zip(alone, responses, strict=True))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\r\n", 404),
        (b"GET /v1/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\r\n", 405),
        (b"HEAD /health HTTP/1.1\r\nhost: e\r\nconnection: close\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ncontent-length: 1\r\n\r\n{", 400),
    ],
)
def test_an_invalid_request_gets_the_right_status(base_url: str, request_bytes: bytes, status: int) -> None:
    with dial(base_url) as connection:
        connection.sendall(request_bytes)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    if status >= 400:
        assert json.loads(body)["error"]["message"]
    else:
        assert body == b""


def test_expect_100_continue_gets_its_response_before_the_body(base_url: str) -> None:
    head, _, body = post("hi", "expect: 100-continue", "connection: close").partition(b"\r\n\r\n")
    with dial(base_url) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK")


def test_many_streams_run_together() -> None:
    with engine(
        "--slots", "200", "--decode-base-s", "0.02", "--prefill-tokens-per-s", "0", "--output-tokens", "8"
    ) as url:
        body = json.dumps({"model": "sim", "prompt": "hi", "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: e\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(
            body
        )
        connections = [dial(url) for _ in range(200)]
        for connection in connections:
            connection.sendall(head + body)
        responses = [read_all(connection) for connection in connections]
        for connection in connections:
            connection.close()
        assert all(
            response.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and response.count(b"data: ") == 10
            for response in responses
        )
        assert metric(url, "vllm:num_requests_running") == metric(url, "vllm:kv_cache_usage_perc") == 0
        assert metric(url, "vllm:generation_tokens_total") == 1600


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--slots", "0"), 2, "--slots: must be at least 1"),
        (("--listen", "nowhere"), 2, "must be HOST:PORT"),
        (("--decode-base-s", "-1"), 2, "must be a number that is not negative"),
        (("--llamacpp", "no-such.gguf"), 1, "there is no file no-such.gguf"),
    ],
)
def test_wrong_usage_is_one_clear_message(options: tuple[str, ...], code: int, message: str) -> None:
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:0", *options]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_a_port_in_use_is_one_clear_message(base_url: str) -> None:
    address = base_url.removeprefix("http://").removesuffix("/v1")
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", address]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert "choose another --listen" in run.stderr
