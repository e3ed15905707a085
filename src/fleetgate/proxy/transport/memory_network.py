"""A network in memory for tests and simulations: connections without sockets, on a clock that does not wait.

`MemoryNetwork` takes the place of `SocketNetwork`; a test plays the other end of each connection through a `RemoteEnd`.
Everything runs on a `SimulatedLoop`: `run_ready` does what can be done now, `advance` moves the clock.
"""

import asyncio
import ipaddress
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Self, SupportsIndex

from fleetgate.proxy.transport.network import ClientTls, P

CALLBACKS_MAX = 1_000_000  # of one `run_ready`; more is a loop without end
WRITE_HIGH_BYTES = 64 * 1024  # asyncio's default
READ_BYTES_MAX = 256 * 1024  # of one read, as asyncio and uvloop have it


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop with a clock that jumps to the next timer. Shape: `names` maps host names to addresses."""

    def __init__(self, now_s: float = 1000.0) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}
        self.turns = 0
        self._now_s = now_s
        self._selector = self  # `_run_once` of the base class asks it for events and for how long to wait

    def time(self) -> float:
        """The simulated clock."""
        return self._now_s

    def select(self, timeout: float | None) -> list[Any]:
        """Wait for nothing: move the clock instead. Raises: `RuntimeError` if nothing can happen any more."""
        self.turns += 1
        if timeout is None:
            raise RuntimeError("the simulated loop waits, but no callback and no timer is left")
        self._now_s += max(0.0, timeout)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """There is no selector to wake."""

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
        """Look up `names`; a literal address is its own. Raises: `socket.gaierror` for an unknown name."""
        addresses = self.names.get(host)
        if addresses is None:
            try:
                addresses = [str(ipaddress.ip_address(host))]
            except ValueError:
                raise socket.gaierror(socket.EAI_NONAME, f"{host} is not in SimulatedLoop.names") from None
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in addresses]

    def run_ready(self) -> None:
        """Run callbacks until none is left, without moving the clock."""
        for _ in range(CALLBACKS_MAX):
            if not self._ready and not self._is_timer_due():  # type: ignore[attr-defined]
                return
            self.call_soon(self.stop)
            self.run_forever()
        raise AssertionError("the callbacks have no end")

    def advance(self, seconds: float) -> None:
        """Move the clock, and run every timer that is due on the way at its own time."""
        self.run_ready()
        end_s = self._now_s + seconds
        while (timer_s := self._next_timer_s()) is not None and timer_s <= end_s:
            self._now_s = max(self._now_s, timer_s)
            self.run_ready()
        self._now_s = end_s
        self.run_ready()

    def _next_timer_s(self) -> float | None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return min((timer.when() for timer in timers if not timer.cancelled()), default=None)

    def _is_timer_due(self) -> bool:
        timer_s = self._next_timer_s()
        return timer_s is not None and timer_s <= self._now_s


class Work:
    """What a program did with the bytes of one connection.

    Units: `looked_at_bytes` searched, compared, decoded or copied by methods of `bytes`, each time anew (`join` and C
    extensions are not seen); `held_bytes` delivered and not yet freed; `reads` calls of `data_received`.
    """

    def __init__(self) -> None:
        self.looked_at_bytes = 0
        self.held_bytes = 0
        self.reads = 0
        self.turn_reads_max = 0  # reads in one turn of the loop
        self._turn = -1
        self._turn_reads = 0

    def count_read(self, turn: int) -> None:
        """Data is delivered in this turn of the loop."""
        self.reads += 1
        self._turn_reads = self._turn_reads + 1 if turn == self._turn else 1
        self._turn = turn
        self.turn_reads_max = max(self.turn_reads_max, self._turn_reads)


class CountedBytes(bytes):
    """Bytes that count what is done with them. Slices and sums of them count too."""

    work: Work

    def __new__(cls, data: bytes, work: Work) -> Self:
        made = super().__new__(cls, data)
        made.work = work
        work.held_bytes += len(data)
        return made

    def __del__(self) -> None:
        self.work.held_bytes -= len(self)

    def _look(self, count: int) -> None:
        self.work.looked_at_bytes += max(0, count)

    def _span(self, start: SupportsIndex | None, end: SupportsIndex | None) -> tuple[int, int]:
        first, last, _ = slice(start, end).indices(len(self))
        return first, last

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if isinstance(part, int):
            self._look(1)
            return part
        self._look(len(part))
        return CountedBytes(part, self.work)

    def __add__(self, other: Any) -> Any:
        total = super().__add__(other)
        self._look(len(total))
        return CountedBytes(total, self.work)

    def __radd__(self, other: Any) -> Any:
        if not isinstance(other, bytes):  # a `bytearray` stays one
            return NotImplemented
        total = other + bytes(self)
        self._look(len(total))
        return CountedBytes(total, self.work)

    def __contains__(self, key: Any) -> bool:
        self._look(len(self))
        return super().__contains__(key)

    def find(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        """As of `bytes`; counts up to what was found."""
        first, last = self._span(start, end)
        found = super().find(sub, start, end)
        self._look((found + (1 if isinstance(sub, int) else len(sub)) if found >= 0 else last) - first)
        return found

    def rfind(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        """As of `bytes`; counts down to what was found."""
        first, last = self._span(start, end)
        found = super().rfind(sub, start, end)
        self._look(last - (found if found >= 0 else first))
        return found

    def count(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        """As of `bytes`."""
        first, last = self._span(start, end)
        self._look(last - first)
        return super().count(sub, start, end)

    def isascii(self) -> bool:
        """As of `bytes`."""
        self._look(len(self))
        return super().isascii()

    def lower(self) -> bytes:
        """As of `bytes`."""
        self._look(len(self))
        return super().lower()

    def strip(self, chars: Any = None, /) -> bytes:
        """As of `bytes`; counts the copy."""
        rest = super().strip(chars)
        self._look(len(rest))
        return rest

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As of `bytes`."""
        self._look(len(self))
        return super().decode(encoding, errors)

    def split(self, sep: Any = None, maxsplit: SupportsIndex = -1) -> list[bytes]:
        """As of `bytes`."""
        self._look(len(self))
        return super().split(sep, maxsplit)

    def partition(self, sep: Any, /) -> tuple[bytes, bytes, bytes]:
        """As of `bytes`."""
        self._look(len(self))
        return super().partition(sep)

    def replace(self, old: Any, new: Any, count: SupportsIndex = -1, /) -> bytes:
        """As of `bytes`."""
        self._look(len(self))
        return super().replace(old, new, count)


class MemoryTransport(asyncio.Transport):
    """The program's end of a connection. It behaves as the event loop's own transports do."""

    def __init__(self, loop: SimulatedLoop, protocol: asyncio.BaseProtocol, extra: dict[str, Any]) -> None:
        super().__init__(extra)
        self.remote = RemoteEnd(self)
        self._loop = loop
        self._protocol = protocol
        self._arriving: deque[bytes | None] = deque()  # None is the end of the stream
        self._is_delivering = False
        self._is_reading = True
        self._is_closing = False
        self._is_lost = False
        self._wrote_eof = False
        self._unsent = bytearray()
        self._high_bytes = WRITE_HIGH_BYTES
        self._low_bytes = WRITE_HIGH_BYTES // 4
        self._is_full = False
        protocol.connection_made(self)

    # --- the side of the program ---

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or keep unsent while the other end does not read."""
        assert not self._wrote_eof, "written after the end"
        if self._is_closing or self._is_lost:
            return
        self._unsent += data
        self.flush()
        if len(self._unsent) > self._high_bytes and not self._is_full:
            self._is_full = True
            self._protocol.pause_writing()

    def flush(self) -> None:
        """Hand over what the other end takes now."""
        remote = self.remote
        taken = len(self._unsent) if remote.reads_bytes is None else min(len(self._unsent), remote.reads_bytes)
        if taken:
            data = bytes(self._unsent[:taken])
            del self._unsent[:taken]
            if remote.reads_bytes is not None:
                remote.reads_bytes -= taken
            remote.take(data)
        if self._is_full and len(self._unsent) <= self._low_bytes:
            self._is_full = False
            self._protocol.resume_writing()
        if self._is_closing and not self._unsent:
            self.lose(None)

    def write_eof(self) -> None:
        """End the program's direction."""
        self._wrote_eof = True
        self.remote.has_eof = True

    def can_write_eof(self) -> bool:
        """As a TCP connection without TLS."""
        return self.get_extra_info("sslcontext") is None

    def close(self) -> None:
        """Close after what is unsent was taken."""
        if not self._is_closing:
            self._is_closing = True
            if not self._unsent:
                self.lose(None)

    def abort(self) -> None:
        """Close at once; what is unsent is lost."""
        self._is_closing = True
        self._unsent.clear()
        if not self._is_lost:
            self.remote.is_aborted = True
            self.lose(None)

    def lose(self, error: Exception | None) -> None:
        """Report the end of the connection in the next turn."""
        if not self._is_lost:
            self._is_lost = self._is_closing = self.remote.is_closed = True
            self._arriving.clear()
            self._loop.call_soon(self._protocol.connection_lost, error)

    def is_closing(self) -> bool:
        """Whether it is closed or about to be."""
        return self._is_closing

    def pause_reading(self) -> None:
        """Deliver nothing until `resume_reading`."""
        self._is_reading = False

    def resume_reading(self) -> None:
        """Deliver what arrived, one read a turn."""
        if not self._is_reading and not self._is_closing:
            self._is_reading = True
            self._deliver_soon()

    def is_reading(self) -> bool:
        """Whether data is delivered."""
        return self._is_reading and not self._is_closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """The sizes at which the protocol is told to pause and to resume writing."""
        self._high_bytes = high if high is not None else WRITE_HIGH_BYTES if low is None else 4 * low
        self._low_bytes = low if low is not None else self._high_bytes // 4

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """The low and the high limit."""
        return self._low_bytes, self._high_bytes

    def get_write_buffer_size(self) -> int:
        """The bytes that the other end has not taken."""
        return len(self._unsent)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Report to another protocol."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that it reports to."""
        return self._protocol

    # --- the side of the network ---

    def arrive(self, data: bytes | None) -> None:
        """Data, or the end of the stream, reached the program's machine."""
        if not self._is_lost:
            if data is None:
                self._arriving.append(data)
            else:
                self._arriving.extend(data[at : at + READ_BYTES_MAX] for at in range(0, len(data), READ_BYTES_MAX))
            self._deliver_soon()

    @property
    def unread_bytes(self) -> int:
        """What arrived and was not read, as a kernel keeps it."""
        return sum(len(data) for data in self._arriving if data is not None)

    def _deliver_soon(self) -> None:
        if self._arriving and self._is_reading and not self._is_delivering:
            self._is_delivering = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_delivering = False
        if not self._arriving or not self._is_reading or self._is_closing:
            return
        data, protocol = self._arriving.popleft(), self._protocol
        assert isinstance(protocol, asyncio.Protocol)
        if data is None:
            if not protocol.eof_received():
                self.close()
        else:
            work = self.remote.work
            work.count_read(self._loop.turns)
            protocol.data_received(CountedBytes(data, work))
        self._deliver_soon()


class RemoteEnd:
    """The end of a connection that a test plays: an engine, or a client."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.work = Work()
        self.received = bytearray()
        self.reads_bytes: int | None = None  # how many more bytes it takes; None for all
        self.has_eof = False  # the program ended its direction
        self.is_closed = False
        self.is_aborted = False  # closed by `abort`
        self.on_received: Callable[[RemoteEnd], None] | None = None  # called after each write of the program
        self._transport = transport

    def take(self, data: bytes) -> None:
        """The program sent something."""
        self.received += data
        if self.on_received is not None:
            self.on_received(self)

    def read_all(self) -> bytes:
        """What was received since the last call."""
        data = bytes(self.received)
        self.received.clear()
        return data

    def send(self, data: bytes, *cuts: int) -> None:
        """Send to the program; it reads one piece a turn. Shape: `cuts` are the positions at which pieces begin."""
        for begin, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
            if begin < end:
                self._transport.arrive(data[begin:end])

    def send_bytewise(self, data: bytes) -> None:
        """Send in pieces of one byte."""
        self.send(data, *range(1, len(data)))

    def end(self) -> None:
        """Close regularly, after everything that was sent."""
        self._transport.arrive(None)

    def reset(self, error: Exception | None = None) -> None:
        """Break the connection at once; data that was not read is lost."""
        self._transport.lose(error or ConnectionResetError("reset by the other end"))

    def stop_reading(self, after_bytes: int = 0) -> None:
        """Take only so many bytes more."""
        self.reads_bytes = after_bytes

    def start_reading(self) -> None:
        """Take everything again."""
        self.reads_bytes = None
        self._transport.flush()

    @property
    def is_paused(self) -> bool:
        """Whether the program has paused reading."""
        return not self._transport.is_reading()

    @property
    def unread_bytes(self) -> int:
        """What was sent and the program has not read."""
        return self._transport.unread_bytes

    @property
    def unsent_bytes(self) -> int:
        """What the program wrote and this end has not taken."""
        return self._transport.get_write_buffer_size()

    @property
    def held_bytes(self) -> int:
        """What the program holds in memory for this connection: data it was given, and data it could not send."""
        return self.work.held_bytes + self.unsent_bytes


class MemoryListener:
    """An address that can be dialled. Shape: `on_connect` is called for each connection, before any data."""

    def __init__(self) -> None:
        self.error: Exception | None = None  # what a dial raises, such as `ConnectionRefusedError`
        self.is_blackhole = False  # a dial gets no answer
        self.dial_s = 0.0
        self.on_connect: Callable[[RemoteEnd], None] | None = None
        self.dials = 0
        self.connections: list[RemoteEnd] = []


class MemoryNetwork:
    """Connections between a program and the listeners and clients of a test."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self._clients = 0

    def listen(self, port: int, host: str = "127.0.0.1") -> MemoryListener:
        """Accept connections at an address; addresses without a listener refuse them."""
        return self._listeners.setdefault((host, port), MemoryListener())

    async def connect(self, host: str, port: int, make_protocol: Callable[[], P], tls: ClientTls | None) -> P:
        """Connect to a listener.

        Raises: `ConnectionRefusedError`, and what the listener's `error` is.
        """
        listener = self._listeners.get((host, port))
        if listener is None:
            raise ConnectionRefusedError(f"nothing listens on {host}:{port}")
        listener.dials += 1
        if listener.is_blackhole:
            await self._loop.create_future()
        await asyncio.sleep(listener.dial_s)
        if listener.error is not None:
            raise listener.error
        protocol = make_protocol()
        extra = {"peername": (host, port), "sslcontext": tls.context if tls else None}
        remote = MemoryTransport(self._loop, protocol, extra).remote
        listener.connections.append(remote)
        if listener.on_connect is not None:
            listener.on_connect(remote)
        return protocol

    def client(self, make_protocol: Callable[[], asyncio.Protocol], address: str = "127.0.0.1") -> RemoteEnd:
        """A client connects to the program."""
        self._clients += 1
        extra = {"peername": (address, 49_151 + self._clients)}
        return MemoryTransport(self._loop, make_protocol(), extra).remote
