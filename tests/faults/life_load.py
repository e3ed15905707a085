"""Clients that never stop: kept connections with short requests, and streams, each answer judged to its last byte."""

import asyncio
import json
import ssl
import threading
import time
from collections import Counter
from functools import partial
from types import TracebackType

PAUSE_S = 0.02


class Broken(Exception):
    """What a client of ours would call a failure."""


class Connection:
    """One HTTP/1.1 client connection, as an SDK keeps it: thrown away when told so or found closed."""

    def __init__(self, port: int, tls: ssl.SSLContext | None, key: str) -> None:
        self._port, self._tls, self._key = port, tls, key
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter
        self.opened = 0
        self.local_port = 0

    async def ask(self, stream: bool, tokens: int) -> bytes:
        """One chat completion; its body. Raises: `Broken`."""
        reader = self._reader
        if reader is None or reader.at_eof():
            self.close()
            name = "chat.test" if self._tls else None
            reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._port, ssl=self._tls, server_hostname=name
            )
            self._reader = reader
            self.local_port = self._writer.get_extra_info("sockname")[1]
            self.opened += 1
        messages = [{"role": "user", "content": "Hello"}]
        body = json.dumps({"model": "m", "messages": messages, "max_tokens": tokens, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\ncontent-length: {len(body)}\r\n"
        key = f"authorization: Bearer {self._key}\r\n" if self._key else ""
        self._writer.write(f"{head}{key}\r\n".encode() + body)
        answered = await reader.readuntil(b"\r\n\r\n")
        if not answered.startswith(b"HTTP/1.1 200 "):
            raise Broken(f"answered {answered[:60]!r}")
        got = await self._body(reader, answered.lower())
        if b"\r\nconnection: close" in answered.lower():
            self.close()
        return got

    @staticmethod
    async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
        _, length, rest = head.partition(b"\r\ncontent-length: ")
        if length:
            return await reader.readexactly(int(rest.partition(b"\r\n")[0]))
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        return b"".join(parts)

    def close(self) -> None:
        """Forget the connection."""
        if self._reader is not None:
            self._reader = None
            self._writer.close()


class Load:
    """Runs in a thread of its own. Shape: `outcomes` counts `short` and `stream` that went well and what did not."""

    def __init__(self, port: int, short: int, streams: int, tls: ssl.SSLContext | None = None, key: str = "") -> None:
        self._make = partial(Connection, port, tls, key)
        self._short, self._streams = short, streams
        self.stream_tokens = 30
        self.reconnects = False  # a new connection for each short request
        self.outcomes: Counter[str] = Counter()
        self.lost: set[int] = set()  # the local ports of connections on which an answer was lost
        self.opened = 0
        self._stop = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.began_s = 0.0
        self.ended_s = 0.0

    def __enter__(self) -> "Load":
        self.began_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client finish its answer."""
        if not self._stop:
            self._stop, self.ended_s = True, time.monotonic()
        self._thread.join(60)

    @property
    def good(self) -> int:
        """Answers that came whole."""
        return self.outcomes["short"] + self.outcomes["stream"]

    @property
    def bad(self) -> dict[str, int]:
        """Everything else."""
        return {what: count for what, count in self.outcomes.items() if what not in ("short", "stream")}

    @property
    def rate(self) -> float:
        """Whole answers a second."""
        return self.good / (self.ended_s - self.began_s)

    async def _run(self) -> None:
        clients = [self._client(False, number) for number in range(self._short)]
        clients += [self._client(True, number) for number in range(self._streams)]
        await asyncio.gather(*clients)

    async def _client(self, stream: bool, number: int) -> None:
        await asyncio.sleep(number * 0.01)
        connection, kind = self._make(), "stream" if stream else "short"
        while not self._stop:
            try:
                got = await asyncio.wait_for(connection.ask(stream, self.stream_tokens if stream else 1), 40)
                whole = not stream or (b'"finish_reason":"' in got and got.endswith(b"data: [DONE]\n\n"))
                self.outcomes[kind if whole else f"{kind}: cut silently"] += 1
                if not whole:
                    self.lost.add(connection.local_port)
            except (TimeoutError, Broken, OSError, EOFError, ssl.SSLError, asyncio.LimitOverrunError) as error:
                self.outcomes[f"{kind}: {type(error).__name__}: {error}"[:120]] += 1
                self.lost.add(connection.local_port)
                connection.close()
                await asyncio.sleep(PAUSE_S)
            if not stream:
                await asyncio.sleep(PAUSE_S)
                if self.reconnects:
                    connection.close()
        self.opened += connection.opened
        connection.close()
