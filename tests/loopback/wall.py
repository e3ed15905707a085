"""The wall: an upstream made for faults. What it does is chosen by the model name; what it saw is the tests' oracle.

It speaks raw bytes over asyncio in a thread of its own, so that no library puts right what a test wants wrong.
"""

import asyncio
import contextlib
import json
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any

import msgspec


class Seen(msgspec.Struct):
    """One request as it came. Units: times on the monotonic clock, 0 for what has not happened."""

    connection: int
    method: str
    path: str
    head: bytes
    headers: dict[str, list[str]]
    body: bytes = b""
    ask: dict[str, Any] = {}
    at_s: float = 0.0
    ended_s: float = 0.0
    gone_s: float = 0.0  # the peer left before the answer was whole

    @property
    def model(self) -> str:
        """The model that was asked for, as the engine knows it."""
        return str(self.ask.get("model", ""))

    def option(self, name: str, default: Any) -> Any:
        """A wish of the test, from the body's `wall` object."""
        return self.ask.get("wall", {}).get(name, default)


class Line(asyncio.Protocol):
    """One connection: reads whole requests and runs the reply that the model names."""

    def __init__(self, wall: "Wall") -> None:
        self.wall = wall
        self.gone = asyncio.Event()
        self.transport: asyncio.Transport
        self.number = 0
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._seen: Seen | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    # --- the loop's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.wall.opened += 1
        self.number = self.wall.opened
        self.wall.lines.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.wall.lines.discard(self)
        self.gone.set()
        self._may_write.set()
        if self._seen is not None and not self._seen.ended_s:
            self._seen.gone_s = time.monotonic()
            self.wall.leave(self._seen)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def _next(self) -> None:
        if self._task is not None or b"\r\n\r\n" not in self._buffer:
            return
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        headers: dict[str, list[str]] = {}
        for row in head.decode("latin-1").split("\r\n")[1:]:
            name, _, value = row.partition(":")
            headers.setdefault(name.lower(), []).append(value.strip())
        length = int(headers.get("content-length", ["0"])[0])
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        method, path, _ = head.decode("latin-1").split("\r\n")[0].split(" ", 2)
        seen = Seen(self.number, method, path, head, headers, rest[:length], at_s=time.monotonic())
        with contextlib.suppress(ValueError):
            seen.ask = json.loads(seen.body)
        self._seen = seen
        if method == "GET":
            self.wall.probes += 1
        else:
            self.wall.enter(seen)
        self._task = asyncio.get_running_loop().create_task(self._answer(seen))

    async def _answer(self, seen: Seen) -> None:
        if seen.method == "GET":
            self.wall.on_get(self, seen)
        elif seen.headers.get("content-type") != ["application/json"]:
            self.write(_UNREADABLE)
        else:
            reply = self.wall.replies.get(seen.model.partition("@")[0], self.wall.replies["ok"])
            await reply(self, seen)
        self.end()
        self._task = None
        self._next()

    # --- for replies ---

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.transport.write(data)

    async def drain(self) -> None:
        """Until the peer has taken most of what was written."""
        await self._may_write.wait()

    def end(self) -> None:
        """The answer is about to be whole; called by itself after the reply, or just before its last write."""
        if self._seen is not None and not self._seen.ended_s and not self._seen.gone_s:
            self._seen.ended_s = time.monotonic()
            if self._seen.method != "GET":
                self.wall.leave(self._seen)

    def close(self) -> None:
        """A regular end of the connection, after what was written."""
        self.end()
        self.transport.close()

    def reset(self) -> None:
        """An end by RST."""
        self.end()
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def flush(self) -> None:
        """Until everything written is in the kernel, so that a reset cannot overtake it."""
        self.transport.set_write_buffer_limits(0)
        await self._may_write.wait()


Reply = Callable[[Line, Seen], Awaitable[None]]
_UNREADABLE = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"  # vLLM's answer to a type that is not JSON


def _well(line: Line, seen: Seen) -> None:
    line.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


def _on_loopback(port: int) -> socket.socket:
    # The protocol is named, or asyncio would leave Nagle's algorithm on for what is accepted.
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


class Wall:
    """A running wall. Shape: `seen` holds POSTs in the order they came; GETs (probes) are only counted."""

    def __init__(
        self,
        replies: dict[str, Reply] | None = None,
        listen: Callable[[int], socket.socket] = _on_loopback,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if replies is None:
            from tests.loopback.wall_replies import REPLIES

            replies = REPLIES
        self.replies = dict(replies)
        self._listen = listen
        self._tls = tls
        self.on_get: Callable[[Line, Seen], None] = _well
        self.seen: list[Seen] = []
        self.lines: set[Line] = set()
        self.opened = 0
        self.probes = 0
        self.active = 0
        self.most_active = 0
        self.port = 0
        self.gate: asyncio.Event
        self.random = random.Random(7)
        self._loop: asyncio.AbstractEventLoop
        self._server: asyncio.Server
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wall", daemon=True)

    def __enter__(self) -> "Wall":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._open(0))
        self._ready.set()
        self._loop.run_forever()
        self._server.close()
        for line in list(self.lines):
            line.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _open(self, port: int) -> None:
        self.gate = asyncio.Event()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Line(self), sock=self._listen(port), backlog=1024, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    # --- what tests ask and do, from their own thread ---

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something on the wall's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def hold(self) -> None:
        """Replies that wait for the gate wait from now on."""
        self._loop.call_soon_threadsafe(self.gate.clear)

    def release(self) -> None:
        """Let them go on."""
        self._loop.call_soon_threadsafe(self.gate.set)

    def fall(self) -> None:
        """Stop listening and reset every connection, as a killed machine does."""

        async def fall() -> None:
            self._server.close()
            for line in list(self.lines):
                line.reset()

        self.call(fall())

    def rise(self) -> None:
        """Listen again on the same port."""
        self.call(self._open(self.port))

    def forget(self) -> None:
        """Begin the records anew. Only while nothing is under way."""
        self.seen = []
        self.most_active = self.active

    def enter(self, seen: Seen) -> None:
        """A request came."""
        self.seen.append(seen)
        self.active += 1
        self.most_active = max(self.most_active, self.active)

    def leave(self, seen: Seen) -> None:
        """Its answer is whole, or the peer left."""
        self.active -= 1

    @property
    def carriers(self) -> set[int]:
        """The connections that carried a POST; probes use their own."""
        return {seen.connection for seen in self.seen}
