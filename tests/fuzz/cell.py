"""A worker's data plane with wires of memory in place of sockets: every byte in, every byte out, nothing in between.

Hub, listener, gate, conversation and relay are the real ones. The clock stands still unless a test moves it.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fleetgate.core.model import Deployment, Gateway, Snapshot
from fleetgate.ipc.signed_file import public_key
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.proxy.worker.worker import WorkerProcess
from fleetgate.supervisor.supervisor import create_shared_memory

CALLS_MAX = 100_000  # of one input; more is a loop without end


class Loop(asyncio.SelectorEventLoop):
    """A real loop that dials in memory: every connection is made at once, and `heard` gets what is sent on it."""

    def __init__(self, heard: Callable[["Wire", int], None]) -> None:
        self.now_s = 0.0  # before the loop itself asks
        super().__init__()
        self._heard = heard

    def time(self) -> float:
        """A clock that a test sets."""
        return self.now_s

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
        """The name is the address."""
        return [(0, 0, 0, "", (host, port))]

    async def create_connection(  # type: ignore[override]
        self, factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        """A wire to the Endpoint at this port."""
        protocol = factory()
        return Wire(self, protocol, lambda wire: self._heard(wire, port)), protocol

    def run(self) -> None:
        """Until no callback is left to do; timers are not waited for."""
        for _ in range(CALLS_MAX):
            if not self._ready:  # type: ignore[attr-defined]
                return
            self.call_soon(self.stop)
            self.run_forever()
        raise AssertionError("callbacks without end")


class Wire(asyncio.Transport):
    """One end of a connection: what is written is kept, and `heard` is called after each write."""

    def __init__(self, loop: Loop, protocol: asyncio.Protocol, heard: Callable[["Wire"], None] | None = None) -> None:
        super().__init__()
        self._loop = loop
        self._heard = heard
        self.protocol = protocol
        self.written = bytearray()
        self.reading = True
        self.closing = False
        self.aborted = False
        self.finished = False  # nothing more is written; reading goes on
        protocol.connection_made(self)

    def feed(self, data: bytes) -> None:
        """The other side sent something."""
        if not self.closing:
            self.protocol.data_received(data)

    def end(self, error: Exception | None = None) -> None:
        """The other side is gone."""
        if not self.closing:
            self.closing = True
            self.protocol.connection_lost(error)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.finished, "written after the end"
        if not self.closing:
            self.written += data
            if self._heard is not None:
                self._heard(self)

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self._loop.call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.finished = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing ever waits."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 50_000) if name == "peername" else default


class Cell:
    """A worker. Shape: `answer` is called for what an upstream wire has been sent, with its Endpoint's port."""

    def __init__(self, data_dir: Path, answer: Callable[[Wire, int], None]) -> None:
        (data_dir / "seal.key").write_bytes(b"s" * 32)
        (data_dir / "pepper").write_bytes(b"p" * 32)
        (data_dir / "signing.pub").write_bytes(public_key(b"k" * 32))
        board_fd, self.board = create_shared_memory(1)
        config = WorkerConfig(
            index=0, workers=1, data_dir=str(data_dir), board_fd=board_fd, listen_fd=-1, auth="none", access_log="off"
        )
        self.loop = Loop(answer)
        self.now_s = self.loop.now_s = 1000.0
        worker = WorkerProcess(config)
        self.plane = worker.start_plane(self.loop)
        self._version = 0

    def use(self, deployments: tuple[Deployment, ...], site: Gateway) -> None:
        """Take a new Snapshot, later than the last one by as long as any breaker stays open."""
        self._version += 1
        self.now_s = self.loop.now_s = self.now_s + 1000.0
        snapshot = Snapshot(version=self._version, made_at_s=0.0, gateways=(site,), deployments=deployments)
        self.plane.snapshots.take(snapshot)

    def peers(self) -> list[EndpointState]:
        """The Endpoints in use."""
        return list(self.plane.active.current.endpoints.values())

    def kept(self) -> list[asyncio.BaseTransport]:
        """The wires of connections that wait for another request."""
        return [connection.transport for peer in self.peers() for connection in peer.pool._idle]

    def connect(self) -> Wire:
        """A client's connection."""
        return Wire(self.loop, ClientConnection(self.plane.connection_services, self.loop))

    def in_flight(self) -> int:
        """What the ledger holds."""
        return sum(self.board.in_flight_total(slot) for slot in self.plane.active.current.deployments)


def with_slot(deployment: Deployment, slot: int) -> Deployment:
    """The same Deployment, of which nothing is known yet."""
    endpoints = tuple(msgspec.structs.replace(one, slot=slot) for one in deployment.endpoints)
    return msgspec.structs.replace(deployment, slot=slot, endpoints=endpoints)
