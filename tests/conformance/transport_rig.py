"""What the transport suite runs on: an engine on sockets or in memory, and a listener that knows the legal order."""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Protocol

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.core.model import Endpoint
from fleetgate.protocols import clients
from fleetgate.protocols.clients.openai import OPERATIONS
from fleetgate.protocols.http1 import ChunkedBody
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.interface import ExpectedResponse, ModelNames, Transport, UpstreamResponse
from fleetgate.proxy.transport.memory_network import MemoryNetwork, SimulatedLoop
from fleetgate.proxy.transport.network import Network, SocketNetwork

OPENAI = clients.find("openai")
HOST = "127.0.0.1"
MEMORY_PORT = 80
TURNS_MAX = 200
WAIT_S = 5.0
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 0\r\n\r\n"
NAMES = ModelNames(b'"m"', b'"m"')
STREAM = ExpectedResponse(OPENAI, OPERATIONS[b"/v1/chat/completions"], False, NAMES)
WHOLE = ExpectedResponse(OPENAI, OPERATIONS[b"/v1/chat/completions"], False, NAMES, wants_whole=True)


def content(word: str) -> bytes:
    """A content event."""
    return b'data: {"id":"1","model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % (
        word.encode()
    )


ROLE = b'data: {"id":"1","model":"m","choices":[{"index":0,"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"id":"1","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
EVENTS = [ROLE, content("a"), b": a comment\n\n", content("b"), content("c"), FINISH, DONE]
BODY = (
    b'{"id":"1","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*payloads: bytes) -> bytes:
    """Each payload as one chunk."""
    return b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads)


def streamed(*events: bytes) -> bytes:
    """A whole streamed response."""
    return STREAM_HEAD + chunked(*events) + b"0\r\n\r\n"


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole response that is not a stream."""
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


class Recorder:
    """A listener that writes down what is reported, and fails at once if that is not legal.

    Legal is: at most one dial report of each kind, then either `not connected`, `stale`, `failed`, or `first` followed
    by writes and one of `ended` and `failed`.
    """

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.written = b""
        self.held = b""
        self.tail = b""
        self.failure: Failure | None = None
        self.reason = ""
        self.response: UpstreamResponse | None = None
        self.cancelled_at_first = False

    @property
    def is_over(self) -> bool:
        """Whether nothing may be reported any more."""
        return bool(self.reports) and self.reports[-1] in ("ended", "failed", "stale", "not connected")

    def _report(self, name: str, response: UpstreamResponse) -> None:
        assert self.response is response, "reported before `send` returned, or of another response"
        assert not self.is_over, f"{name} after {self.reports}"
        assert name not in self.reports, f"{name} twice"
        self.reports.append(name)

    def on_first(self, response: UpstreamResponse) -> None:
        self._report("first", response)
        assert response.status and not response.over
        self.held = b"".join(response.held)
        if self.cancelled_at_first:
            response.cancel()

    def on_failed(self, response: UpstreamResponse, event: AttemptFailed) -> None:
        self._report("failed", response)
        assert response.over and not response.is_connected
        self.failure = event.failure

    def on_stale(self, response: UpstreamResponse) -> None:
        assert "first" not in self.reports and "connected" not in self.reports
        self._report("stale", response)
        assert response.over

    def on_ended(self, response: UpstreamResponse, tail: bytes) -> None:
        assert "first" in self.reports, "an end without any content"
        self._report("ended", response)
        assert response.over and (response.finish_seen or response.body_bytes)
        self.tail = tail

    def on_dial_slow(self, response: UpstreamResponse) -> None:
        assert "connected" not in self.reports
        self._report("dial slow", response)

    def on_connected(self, response: UpstreamResponse) -> None:
        assert response.is_connected
        self._report("connected", response)

    def on_not_connected(self, response: UpstreamResponse, failure: Failure, reason: str) -> None:
        assert "connected" not in self.reports and reason
        self._report("not connected", response)
        self.failure, self.reason = failure, reason

    def on_internal_error(self, error: Exception) -> None:
        raise error

    def write(self, data: bytes) -> None:
        assert self.reports and self.reports[-1] == "first", f"written after {self.reports}"
        self.written += data

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def payload(self) -> bytes:
        """What the client of a stream gets, without its framing; it must end the framing."""
        body = ChunkedBody()
        payload = body.feed(self.written + self.tail)
        assert body.done and not body.rest
        return payload


class EngineEnd(Protocol):
    """One connection as the engine has it."""

    received: bytearray
    is_closed: bool

    def send(self, data: bytes, *cuts: int) -> None:
        """Send data, cut into pieces."""

    def end(self) -> None:
        """Close regularly."""

    def reset(self) -> None:
        """Break the connection."""


class SocketEnd(asyncio.Protocol):
    """A connection of an engine on a real socket."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.is_closed = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True

    def send(self, data: bytes, *cuts: int) -> None:
        """The pieces go out 5 ms after each other, so that each is a read of its own on most machines."""
        loop = asyncio.get_running_loop()
        for number, (begin, end) in enumerate(zip((0, *cuts), (*cuts, len(data)), strict=True)):
            loop.call_later(0.005 * number, self._transport.write, data[begin:end])

    def end(self) -> None:
        self._transport.close()

    def reset(self) -> None:
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()


class World(Protocol):
    """A place where a transport meets engines."""

    network: Network
    port: int
    closed_port: int

    @property
    def connections(self) -> list[EngineEnd]:
        """Those that the engine accepted, in order."""

    async def turns(self) -> None:
        """Let happen what can happen now."""

    def run(self, scene: Coroutine[None, None, None]) -> None:
        """Run a scene to its end."""


class MemoryWorld:
    """An in-memory network on a simulated clock."""

    def __init__(self) -> None:
        self.loop = SimulatedLoop()
        self.memory = MemoryNetwork(self.loop)
        self.network: Network = self.memory
        self.port, self.closed_port = MEMORY_PORT, MEMORY_PORT + 1
        self.listener = self.memory.listen(self.port, HOST)

    @property
    def connections(self) -> list[EngineEnd]:
        return list(self.listener.connections)

    async def turns(self) -> None:
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)

    def run(self, scene: Coroutine[None, None, None]) -> None:
        try:
            self.loop.run_until_complete(scene)
        finally:
            self.loop.close()


class SocketWorld:
    """Loopback sockets."""

    def __init__(self) -> None:
        self.accepted: list[SocketEnd] = []
        self.network: Network
        self.port = self.closed_port = 0

    @property
    def connections(self) -> list[EngineEnd]:
        return list(self.accepted)

    async def turns(self) -> None:
        await asyncio.sleep(0.05)

    def run(self, scene: Coroutine[None, None, None]) -> None:
        asyncio.run(self._serve(scene))

    async def _serve(self, scene: Coroutine[None, None, None]) -> None:
        loop = asyncio.get_running_loop()
        self.network = SocketNetwork(loop)
        with socket.create_server((HOST, 0)) as closed:
            self.closed_port = closed.getsockname()[1]
        server = await loop.create_server(self._accept, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            await scene
        finally:
            server.close()

    def _accept(self) -> SocketEnd:
        self.accepted.append(SocketEnd())
        return self.accepted[-1]


WORLDS: dict[str, Callable[[], World]] = {"memory": MemoryWorld, "sockets": SocketWorld}


class Rig:
    """A transport in a world, with one pool."""

    def __init__(self, world: World, module: ModuleType) -> None:
        self.world = world
        self._module = module
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: Transport | None = None
        self._met = 0
        self.pool = self.pool_at(0)

    def pool_at(self, port: int) -> ConnectionPool:
        """A pool for an engine at this port; 0 for the world's own engine, which is known when the loop runs."""
        return ConnectionPool(Endpoint(slot=0, scheme="http", host=HOST, port=port, base_path="/v1"), None, None)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def send(
        self,
        expected: ExpectedResponse,
        *,
        fresh: bool = False,
        pool: ConnectionPool | None = None,
        recorder: Recorder | None = None,
    ) -> Recorder:
        """Send a request and record what is reported of its response."""
        if self._transport is None:
            self._transport = self._module.make(self.world.network, self._spawn)
            self.pool = self.pool_at(self.world.port)
        listener = recorder or Recorder()
        listener.response = self._transport.send(
            pool or self.pool, (REQUEST,), expected, listener, connect_timeout_s=1.0, fresh=fresh
        )
        return listener

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition."""
        deadline_s = asyncio.get_running_loop().time() + WAIT_S
        while not condition():
            assert asyncio.get_running_loop().time() < deadline_s, "it did not happen"
            await asyncio.sleep(0.001)

    async def over(self, recorder: Recorder) -> None:
        """Wait for the last report of a response."""
        await self.until(lambda: recorder.is_over)

    async def closed(self, engine: EngineEnd) -> None:
        """Wait until the engine's connection is closed."""
        await self.until(lambda: engine.is_closed)

    async def kept(self) -> None:
        """Wait until the pool keeps a connection."""
        await self.until(lambda: self.pool._idle)

    async def engine(self, requests: int = 1) -> EngineEnd:
        """The engine's end of the next new connection, or of the last one, once it has so many whole requests."""
        self._met += requests == 1
        number = self._met - 1
        await self.until(
            lambda: (
                len(self.world.connections) > number
                and self.world.connections[number].received.count(REQUEST) >= requests
            )
        )
        return self.world.connections[number]


def run(world: World, module: ModuleType, scene: Callable[[Rig], Coroutine[None, None, None]]) -> None:
    """Run a scene with a transport in a world."""
    rig = Rig(world, module)
    world.run(scene(rig))


@contextmanager
def dropped_in(package: ModuleType, folder: str) -> Iterator[None]:
    """The package looks into this folder too, for a while."""
    package.__path__.append(folder)
    package.names.cache_clear()
    package.find.cache_clear()
    try:
        yield
    finally:
        package.__path__.remove(folder)
        package.names.cache_clear()
        package.find.cache_clear()
