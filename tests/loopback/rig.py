"""A worker on real sockets with a Snapshot written by the test: the data plane without a control plane."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from fleetgate.core.model import (
    Deployment,
    Endpoint,
    Gateway,
    Snapshot,
    Upstream,
    encode_snapshot,
)
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.ipc.signed_file import PUBLIC_KEY, public_key, sign
from fleetgate.proxy.worker.config import ENV, WorkerConfig
from fleetgate.supervisor.listeners import open_listeners
from fleetgate.supervisor.supervisor import create_shared_memory
from tests.waiting import wait_for

PEPPER = b"p" * 32
SIGNING_KEY = b"k" * 32


class Rig:
    """Workers that share one port, one board and one data directory."""

    def __init__(self, data_dir: Path, workers: int = 1, auth: str = "none", **options: object) -> None:
        self.data_dir = data_dir
        self.patience: Mapping[str, float | str] = {}  # `fleetgate.a.b.NAME`: shorter waits for tests of waits
        self.board_fd, self.board = create_shared_memory(workers)
        self._listeners = open_listeners("127.0.0.1:0", "--listen", workers)
        self.port: int = self._listeners[0].getsockname()[1]
        self._pipes = [os.pipe() for _ in range(workers)]
        for read_end, write_end in self._pipes:
            os.set_blocking(read_end, False)
            os.set_blocking(write_end, False)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.version = 0
        (data_dir / "pepper").write_bytes(PEPPER)
        (data_dir / "seal.key").write_bytes(b"s" * 32)
        (data_dir / PUBLIC_KEY).write_bytes(public_key(SIGNING_KEY))
        # No canary: most tests publish what fails on purpose, and it must reach all workers at once.
        self._options = {
            "auth": auth,
            "access_log": str(data_dir / "access.log"),
            "lb_grace_s": 0.0,
            "canary": False,
            **options,
        }

    def config(self, index: int) -> WorkerConfig:
        """What one worker is told."""
        return WorkerConfig(
            index=index,
            workers=self.board.workers,
            data_dir=str(self.data_dir),
            board_fd=self.board_fd,
            listen_fd=self._listeners[index].fileno(),
            wake_fd=self._pipes[index][0],
            wake_fds=[write_end for _, write_end in self._pipes],
            **self._options,  # type: ignore[arg-type]
        )

    @property
    def fds(self) -> list[int]:
        """Every descriptor that a worker may inherit."""
        pipes = [fd for pair in self._pipes for fd in pair]
        return [self.board_fd, *(listener.fileno() for listener in self._listeners), *pipes]

    def start(self, index: int) -> subprocess.Popen[bytes]:
        """Start (or start again) one worker."""
        config = self.config(index)
        fds = [fd for fd in (*self.fds, config.life_fd) if fd >= 0]
        env = {**os.environ, ENV: msgspec.json.encode(config).decode()}
        lines = ["import fleetgate.proxy.worker.worker as worker", "import fleetgate.proxy.transport.response_relay"]
        lines += [f"{name}; {name} = {value}" for name, value in self.patience.items()]  # a wrong name ends the worker
        process = subprocess.Popen([sys.executable, "-c", "\n".join([*lines, "worker.main()"])], env=env, pass_fds=fds)
        self.processes.append(process)
        return process

    def publish(self, **parts: object) -> None:
        """Write the next Snapshot, as the publisher does."""
        self.version += 1
        fields = {"version": self.version, "made_at_s": time.time(), "emptied": not parts.get("gateways"), **parts}
        write_snapshot(self.data_dir, sign(encode_snapshot(Snapshot(**fields)), SIGNING_KEY))  # type: ignore[arg-type]

    def wait_until_used(self) -> None:
        """Until every worker accepts and uses the last Snapshot."""
        workers = range(self.board.workers)
        wait_for(
            lambda: all(
                self.board.get(w, WorkerCell.ACCEPTING)
                and self.board.get(w, WorkerCell.SNAPSHOT_VERSION) >= self.version
                for w in workers
            )
        )

    def wait_a_look(self) -> None:
        """Until every worker has looked at the board again, which it does once a second."""
        time.sleep(1.5)

    def __enter__(self) -> "Rig":
        for index in range(self.board.workers):
            self.start(index)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for listener in self._listeners:
            listener.close()
        for pair in self._pipes:
            for fd in pair:
                os.close(fd)


def write_snapshot(data_dir: Path, data: bytes) -> None:
    """Replace the Snapshot file whole."""
    fresh = data_dir / "snapshot.new"
    fresh.write_bytes(data)
    fresh.rename(data_dir / "snapshot")


def mapped(board_fd: int, workers: int) -> SharedMemory:
    """The board behind an inherited descriptor."""
    return SharedMemory(memoryview(mmap.mmap(board_fd, SharedMemory.bytes_needed(workers))), workers)


def deployment(name: str, port: int, slot: int, **options: object) -> Deployment:
    """A Deployment of one Endpoint on loopback, serving model `m`."""
    endpoint = Endpoint(slot=slot, scheme="http", host="127.0.0.1", port=port, base_path="/v1")
    fields: dict[str, object] = {
        "region": f"region-{name}",
        "engine": "openai",
        "models": {"m": "m"},
        "endpoints": (endpoint,),
        "egress_checked": False,
        **options,
    }
    return Deployment(slot=slot, name=name, **fields)  # type: ignore[arg-type]


def gateway(*names: str, **options: object) -> Gateway:
    """A Gateway `chat.test` over these Deployments, ranked in their order."""
    upstreams = tuple(Upstream(deployment=name, rank=rank) for rank, name in enumerate(names, 1))
    fields: dict[str, object] = {
        "slot": 0,
        "name": "chat",
        "domain": "test",
        "protocol": "openai",
        "strategy": "overflow",
        "upstreams": upstreams,
        **options,
    }
    return Gateway(**fields)  # type: ignore[arg-type]
