"""A control process on a real socket with a real data directory: the control plane without a data plane."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import msgspec

from fleetgate.control.config import ENV, ControlConfig
from fleetgate.core.model import Snapshot, decode_snapshot
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.ipc.signed_file import verified
from fleetgate.supervisor.listeners import open_listener
from fleetgate.supervisor.supervisor import create_shared_memory
from tests.waiting import wait_for

DEPLOYMENT = {
    "kind": "Deployment",
    "name": "llama-us",
    "region": "us-east",
    "models": [{"name": "llama", "upstream_name": "meta/llama"}],
    "engine": "vllm",
    "url": "http://127.0.0.1:9/v1",
}
GATEWAY = {
    "kind": "Gateway",
    "name": "chat",
    "domain": "example.com",
    "protocol": "openai",
    "strategy": "overflow",
    "upstreams": [{"deployment": "llama-us"}],
}


class ControlRig:
    """One control process; it can be killed and started again on the same socket and board, as the supervisor does."""

    def __init__(self, data_dir: Path, workers: int = 1, **options: Any) -> None:
        self.data_dir = data_dir
        self.board_fd, self.board = create_shared_memory(workers)
        self._listener: socket.socket = open_listener("127.0.0.1:0", "--api-listen")
        self.port: int = self._listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._life_read, self._life_write = os.pipe()
        self._options = {"egress_allow": ["127.0.0.0/8", "::1/128"], **options}
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start the process and do not wait."""
        config = ControlConfig(
            data_dir=str(self.data_dir),
            api_fd=self._listener.fileno(),
            board_fd=self.board_fd,
            workers=self.board.workers,
            life_fd=self._life_read,
            api_listen=f"127.0.0.1:{self.port}",
            **self._options,
        )
        env = {**os.environ, ENV: msgspec.json.encode(config).decode()}
        fds = [self.board_fd, config.api_fd, self._life_read]
        command = [sys.executable, "-m", "fleetgate.control.process"]
        self.process = subprocess.Popen(command, env=env, pass_fds=fds, stderr=subprocess.PIPE)
        return self.process

    def start(self) -> "ControlRig":
        """Start the process and wait until it answers."""
        process = self.spawn()
        with httpx2.Client(trust_env=False) as client:
            wait_for(lambda: process.poll() is not None or self._answers(client))
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        return self

    def client(self) -> httpx2.Client:
        """A session of the owner."""
        token = (self.data_dir / "owner-token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=self.base_url, headers=headers, trust_env=False, timeout=30.0)

    def snapshot(self) -> Snapshot:
        """What is published."""
        data = (self.data_dir / "snapshot").read_bytes()
        return decode_snapshot(verified(data, (self.data_dir / "signing.pub").read_bytes()))

    def act_as_worker(self, worker: int, version: int) -> None:
        """Write the cells that a worker of this version writes."""
        self.board.set(worker, WorkerCell.PID, os.getpid())
        self.board.set(worker, WorkerCell.ACCEPTING, 1)
        self.board.set(worker, WorkerCell.SNAPSHOT_VERSION, version)
        self.board.set(worker, WorkerCell.STARTS, max(1, self.board.get(worker, WorkerCell.STARTS)))

    def end_life(self) -> None:
        """What the supervisor's end does: its end of the pipe closes."""
        if self._life_write >= 0:
            os.close(self._life_write)
            self._life_write = -1

    def kill(self) -> None:
        """End the process as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Ask the process to end, and give its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=20)

    def __enter__(self) -> "ControlRig":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_life()  # engines that a failed test left end too
        self.kill()
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()
        self._listener.close()
        os.close(self._life_read)

    def _answers(self, client: httpx2.Client) -> bool:
        try:
            return client.get(f"{self.base_url}/healthz", timeout=1.0).status_code == 200
        except httpx2.TransportError:
            return False


def board_of(workers: int = 1) -> SharedMemory:
    """A board in ordinary memory."""
    return SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(workers))), workers)
