"""Provider `local`: replicas are processes on this machine, each under a shim (see `local_shim.py`)."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleetgate.providers.base import (
    BadSpec,
    Broken,
    NotNow,
    Replica,
    ReplicaSpec,
    ReplicaState,
    Settings,
)
from fleetgate.providers.local_shim import TERM_GRACE_S, process_start, signal_group

NAME = "local"
HEALTH_TIMEOUT_S = 1.0
_SHIM_START_S_MAX = 10.0
_POLL_S = 0.02
_LOG_TAIL_BYTES = 400
_HOST = "127.0.0.1"
_PRIVATE_ENV = "FLEETGATE_"  # configuration of Fleetgate's own processes, which an engine must not see


class LocalReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """A state file, which a shim writes about its engine.

    Units: `*_start` in kernel ticks. Shape: `ended` is empty while the engine runs.
    """

    id: str
    deployment: str
    fingerprint: str
    port: int
    url: str
    health: str
    shim_pid: int = msgspec.field(default=0, name="keeper_pid")
    shim_start: int = msgspec.field(default=0, name="keeper_start")
    engine_pid: int = 0
    engine_start: int = 0
    stopping: bool = False
    ended: str = ""
    exit_code: int = -1
    bad_command: bool = False

    @property
    def shim_runs(self) -> bool:
        """Whether its shim runs."""
        return _is_same_process(self.shim_pid, self.shim_start)

    @property
    def engine_runs(self) -> bool:
        """Whether its engine runs."""
        return _is_same_process(self.engine_pid, self.engine_start)


class LocalProvider:
    """Runs replicas as processes. Their state is in `DATA_DIR/engines`, where a later control process finds it."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.data_dir / "engines"
        self._life_fd = settings.life_fd
        self._ready: set[tuple[str, int]] = set()  # id and engine start; health checks watch a ready one
        self._children: list[subprocess.Popen[bytes]] = []

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Start a shim, which starts the engine. Raises: `BadSpec`, `NotNow`, `Broken`."""
        workload = spec.workload
        if workload.image or not workload.command:
            raise BadSpec(f"{spec.deployment}: provider local needs a command; give workload.command, and no image")
        self._make_folder()
        port = workload.port or self._free_port()
        if workload.port and not _is_free(port):
            raise NotNow(f"{spec.deployment}: workload.port {port} is in use on this machine; give another port or 0")
        fields = {"{port}": str(port)}
        state = LocalReplicaState(
            id=spec.id,
            deployment=spec.deployment,
            fingerprint=workload.fingerprint,
            port=port,
            url=f"http://{_HOST}:{port}/v1",
            health=workload.health,
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_PRIVATE_ENV)}
        job = {
            "state": msgspec.to_builtins(state),
            "state_file": str(self._state_file(spec.id)),
            "log_file": str(self._log_file(spec.id)),
            "argv": [_substitute(word, fields) for word in (*workload.command, *workload.args)],
            "env": environment
            | {"PORT": str(port)}
            | {name: _substitute(value, fields) for name, value in workload.env.items()},
            "life_fd": self._life_fd,
        }
        self._state_file(spec.id).unlink(missing_ok=True)
        shim = self._spawn(job)
        return await self._wait_for_state(spec, shim)

    async def stop(self, replica: Replica) -> None:
        """Ask the shim to end its engine, and wait until it has."""
        path = self._state_file(replica.id)
        state = _read(path)
        if state is None:
            return
        end_s = time.monotonic() + TERM_GRACE_S + HEALTH_TIMEOUT_S
        while state.shim_runs and time.monotonic() < end_s:
            _signal(state.shim_pid, signal.SIGTERM)
            await asyncio.sleep(_POLL_S)
            self._reap()
        if state.shim_runs:
            _signal(state.shim_pid, signal.SIGKILL)
        if state.engine_runs:
            signal_group(state.engine_pid, signal.SIGKILL)
        path.unlink(missing_ok=True)
        if replica.state is not ReplicaState.FAILED:  # the operator needs the log of a failed engine
            self._log_file(replica.id).unlink(missing_ok=True)

    async def list(self) -> Sequence[Replica]:
        """List the replicas of the state files, checked against the processes and their health paths."""
        self._reap()
        states = [state for path in sorted(self._folder.glob("*.json")) if (state := _read(path)) is not None]
        return await asyncio.gather(*(self._observe(state) for state in states))

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Broken(f"{self._folder} cannot be created: {error.strerror}; give a writable --data-dir") from None

    def _state_file(self, replica_id: str) -> Path:
        return self._folder / f"{replica_id}.json"

    def _log_file(self, replica_id: str) -> Path:
        return self._folder / f"{replica_id}.log"

    def _free_port(self) -> int:
        used = {state.port for path in self._folder.glob("*.json") if (state := _read(path)) is not None}
        while True:
            with socket.socket() as probe:
                probe.bind((_HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in used:
                return port

    def _spawn(self, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        try:
            shim = subprocess.Popen(
                [sys.executable, "-m", "fleetgate.providers.local_shim"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._life_fd,) if self._life_fd >= 0 else (),
                start_new_session=True,
            )
        except OSError as error:
            raise NotNow(f"this machine cannot start another process: {error.strerror}") from None
        self._children.append(shim)
        assert shim.stdin is not None
        # Environment and arguments may hold secrets. They go through a pipe, because every user can read argv.
        with shim.stdin as pipe:
            pipe.write(json.dumps(job).encode())
        return shim

    async def _wait_for_state(self, spec: ReplicaSpec, shim: subprocess.Popen[bytes]) -> Replica:
        path = self._state_file(spec.id)
        end_s = time.monotonic() + _SHIM_START_S_MAX
        # Another process writes the file, so there is no event to wait for.
        while (state := _read(path)) is None and shim.poll() is None and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        state = state or _read(path)
        if state is None:
            shim.kill()
            raise Broken(f"{spec.deployment}: the shim of {spec.id} did not start; see the log of `fleetgate up`")
        if state.bad_command:
            path.unlink(missing_ok=True)
            raise BadSpec(f"{spec.deployment}: {state.ended}; correct workload.command")
        return _replica(state, ReplicaState.STARTING)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    async def _observe(self, state: LocalReplicaState) -> Replica:
        if state.ended or not state.shim_runs:
            cause = state.ended or "its shim was killed"
            # A killed engine did not log the reason; its last line would mislead.
            last_line = self._last_line(state.id) if state.exit_code >= 0 else ""
            return _replica(state, ReplicaState.FAILED, cause + last_line)
        if state.stopping or not state.engine_runs:  # the shim is about to write how it ended
            return _replica(state, ReplicaState.STOPPING)
        engine = (state.id, state.engine_start)
        if engine not in self._ready and await _is_healthy(state.port, state.health):
            self._ready.add(engine)
        return _replica(state, ReplicaState.READY if engine in self._ready else ReplicaState.STARTING)

    def _last_line(self, replica_id: str) -> str:
        try:
            with self._log_file(replica_id).open("rb") as log:
                log.seek(-min(_LOG_TAIL_BYTES, log.seek(0, os.SEEK_END)), os.SEEK_END)
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f"; its last line was: {lines[-1].strip()}" if lines else ""


def _substitute(text: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(name, value)
    return text


_decode = msgspec.json.Decoder(LocalReplicaState).decode


def _read(path: Path) -> LocalReplicaState | None:
    """Read a state file; None if it is missing or was not written by a shim."""
    try:
        return _decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _replica(state: LocalReplicaState, replica_state: ReplicaState, because: str = "") -> Replica:
    return Replica(
        id=state.id,
        deployment=state.deployment,
        url=state.url,
        state=replica_state,
        fingerprint=state.fingerprint,
        ref=str(state.engine_pid or ""),
        because=because,
    )


def _is_same_process(pid: int, start: int) -> bool:
    """Return whether this process still runs, and not a later one with the same pid."""
    return start != 0 and process_start(pid) == start


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


async def _is_healthy(port: int, path: str) -> bool:
    """Return whether a GET of the health path gets a 200."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(_HOST, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: {_HOST}:{port}\r\nconnection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split(b" ", 2)[1:2] == [b"200"]


def make(settings: Settings) -> LocalProvider:
    """Make the provider of one data directory."""
    return LocalProvider(settings)
