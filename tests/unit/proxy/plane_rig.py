"""A worker's whole data plane on the in-memory network: the test plays clients and engines, and no socket exists."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from fleetgate.core.admission.work_ledger import WORK_CELLS, WorkCell
from fleetgate.core.model import Key, Snapshot
from fleetgate.core.usage_record import JOURNAL
from fleetgate.ipc.signed_file import public_key
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.transport.memory_network import MemoryListener, MemoryNetwork, RemoteEnd, SimulatedLoop
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.proxy.worker.ticker import TICK_S
from fleetgate.proxy.worker.worker import WorkerProcess
from fleetgate.supervisor.supervisor import create_shared_memory
from tests.loopback.rig import deployment, gateway

NAMES = ("one", "two", "three")
PORTS = (8001, 8002, 8003)


class Plane:
    """Deployments `one`, `two` and `three` behind the Gateway `chat.test`, in this order of rank."""

    def __init__(self, data_dir: Path, auth: str = "none") -> None:
        for name, key in (("seal.key", b"s" * 32), ("pepper", b"p" * 32), ("signing.pub", public_key(b"k" * 32))):
            (data_dir / name).write_bytes(key)
        self.data_dir = data_dir
        self._memory_fd, self.shared = create_shared_memory(1)
        config = WorkerConfig(
            index=0,
            workers=1,
            data_dir=str(data_dir),
            board_fd=self._memory_fd,
            listen_fd=-1,
            auth=auth,
            access_log="off",
        )
        self.loop = SimulatedLoop()
        self.network = MemoryNetwork(self.loop)
        self.engines: list[MemoryListener] = [self.network.listen(port) for port in PORTS]
        self.services = WorkerProcess(config).start_plane(self.loop, self.network)
        self.loop.set_exception_handler(lambda _, context: self.services.boundary.on_loop_error(context))
        self.version = 0
        self.take()

    def take(
        self, count: int = 2, keys: tuple[Key, ...] = (), each: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        """Use a Snapshot of the first `count` Deployments. Shape: `each` are their fields, `fields` the Gateway's."""
        self.version += 1
        deployments = tuple(deployment(NAMES[at], PORTS[at], at, **(each or {})) for at in range(count))
        chat = gateway(*NAMES[:count], default=True, **fields)
        snapshot = Snapshot(version=self.version, made_at_s=0.0, gateways=(chat,), deployments=deployments, keys=keys)
        assert self.services.snapshots.take(snapshot)
        self.run()

    def run(self) -> None:
        """Let happen what can happen now."""
        self.loop.run_ready()

    def wait(self, seconds: float) -> None:
        """Let time pass, with the worker's ticks."""
        for _ in range(round(seconds / TICK_S)):
            self.loop.advance(TICK_S)
            self.services.ticker.tick()
        self.run()

    def ask(self, stream: bool = False, headers: bytes = b"", version: bytes = b"1.1", **fields: Any) -> RemoteEnd:
        """A client connects and sends a request."""
        client = self.connect()
        self.ask_again(client, stream, headers, version, **fields)
        return client

    def ask_again(
        self, client: RemoteEnd, stream: bool = False, headers: bytes = b"", version: bytes = b"1.1", **fields: Any
    ) -> None:
        """A client sends a request on its connection."""
        asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
        body = json.dumps({**asked, "stream": True} if stream else asked).encode()
        head = b"POST /v1/chat/completions HTTP/%b\r\nhost: chat.test\r\n%bcontent-length: %d\r\n\r\n"
        client.send(head % (version, headers, len(body)) + body)
        self.run()

    def connect(self) -> RemoteEnd:
        """A client connects."""
        client = self.network.client(lambda: ClientConnection(self.services.connection_services, self.loop))
        self.run()
        return client

    def answer(self, engine: RemoteEnd, data: bytes) -> None:
        """An engine sends something."""
        engine.send(data)
        self.run()

    def engine(self, number: int) -> RemoteEnd:
        """The only connection, so far, to an engine."""
        (connection,) = self.engines[number].connections
        return connection

    def in_flight(self) -> int:
        """The slots that are taken."""
        return sum(self.shared.in_flight_total(slot) for slot in range(len(NAMES)))

    def is_idle(self) -> bool:
        """Whether no request holds anything: no slot, no token work, no place in a queue or a list."""
        registry, shared = self.services.registry, self.shared
        endpoints = self.services.active.current.endpoints.values()
        cells = (WorkCell.PENDING_TOKENS, WorkCell.SEQUENCES, WorkCell.KV_TOKENS)
        return not (
            self.in_flight()
            or registry.in_flight
            or registry.has_waiting
            or any(one.in_flight or one.trials for one in endpoints)
            or any(shared.work[slot * WORK_CELLS + cell] for slot in range(len(NAMES)) for cell in cells)
            or any(shared.milliunits)
        )

    def usage(self) -> list[dict[str, Any]]:
        """The rows of the usage journal."""
        segments = sorted((self.data_dir / JOURNAL).glob("*.0*"))
        lines = b"".join(segment.read_bytes().rstrip(b"\0") for segment in segments).splitlines()
        return [msgspec.json.decode(line) for line in lines]

    def settlements(self) -> list[tuple[str, str]]:
        """The Deployment and the outcome of each settled attempt. Every attempt is begun once and settled once."""
        begun = {row["id"]: row["deployment"] for row in self.usage() if row["t"] == "i"}
        settled = [row for row in self.usage() if row["t"] == "s"]
        assert sorted(row["id"] for row in settled) == sorted(begun), "begun and settled are not the same attempts"
        return [(begun[row["id"]], row["outcome"]) for row in settled]

    def metric(self, series: str) -> int:
        """The value of a counter."""
        return self.shared.series_totals().get(series, 0)

    def close(self) -> None:
        """End the threads, and free what the kernel keeps."""
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.run()
        self.services.close()
        self.loop.close()
        os.close(self._memory_fd)


@contextmanager
def plane_in(data_dir: Path, auth: str = "none") -> Iterator[Plane]:
    """A data plane; at the end nothing may be held, and no internal error may have happened."""
    made = Plane(data_dir, auth)
    try:
        yield made
        assert made.is_idle(), "a request has left something behind"
        made.settlements()
    finally:
        made.close()


def status_of(client: RemoteEnd) -> int:
    """The status of the answer that the client has got."""
    return int(client.received[9:12])


def header_of(client: RemoteEnd, name: str) -> str:
    """A header of the answer that the client has got, empty without it."""
    head = bytes(client.received).partition(b"\r\n\r\n")[0].decode().split("\r\n")
    found = [line.partition(": ")[2] for line in head[1:] if line.partition(": ")[0] == name]
    return found[0] if found else ""


def code_of(client: RemoteEnd) -> str:
    """The code of the error that the client has got."""
    error = msgspec.json.decode(bytes(client.received).partition(b"\r\n\r\n")[2])["error"]
    return str(error["code"])
