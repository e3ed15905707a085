"""Provider `local`: replicas are processes on this machine, each run by a keeper (see `keeper.py`)."""

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
_KEEPER_START_S_MAX = 10.0
_LOOK_S = 0.02
_LOG_TAIL_BYTES = 400
_HOST = "127.0.0.1"
# What this process was told about itself is none of an engine's business.
_PRIVATE_ENV = "FLEETGATE_"


class LocalReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """What a keeper writes of its engine. Shape: `ended` is empty while it runs; a `*_start` is in kernel ticks."""

    id: str
    deployment: str
    fingerprint: str
    port: int
    url: str
    health: str
    keeper_pid: int = 0
    keeper_start: int = 0
    engine_pid: int = 0
    engine_start: int = 0
    stopping: bool = False
    ended: str = ""
    exit_code: int = -1
    bad_command: bool = False

    @property
    def keeper_lives(self) -> bool:
        """Whether its keeper runs."""
        return _is_same_process(self.keeper_pid, self.keeper_start)

    @property
    def engine_lives(self) -> bool:
        """Whether its engine runs."""
        return _is_same_process(self.engine_pid, self.engine_start)


class LocalProvider:
    """Runs replicas as processes; what runs is written in `DATA_DIR/engines`, so a later process finds it again."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.data_dir / "engines"
        self._life_fd = settings.life_fd
        self._ready: set[tuple[str, int]] = set()  # replica and start of its engine: once ready, watched by probes
        self._children: list[subprocess.Popen[bytes]] = []

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Start an engine's keeper. Raises: `BadSpec`, `NotNow`, `Broken`."""
        workload = spec.workload
        if workload.image or not workload.command:
            raise BadSpec(f"{spec.deployment}: provider local runs commands: give workload.command, and no image")
        self._make_folder()
        port = workload.port or self._free_port()
        if workload.port and not _is_free(port):
            raise NotNow(f"{spec.deployment}: port {port} (workload.port) is taken on this machine")
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
            "argv": [_filled(word, fields) for word in (*workload.command, *workload.args)],
            "env": environment
            | {"PORT": str(port)}
            | {name: _filled(value, fields) for name, value in workload.env.items()},
            "life_fd": self._life_fd,
        }
        self._state_file(spec.id).unlink(missing_ok=True)
        keeper = self._spawn(job)
        return await self._started(spec, keeper)

    async def stop(self, replica: Replica) -> None:
        """Ask the keeper to end its engine, and wait for it."""
        path = self._state_file(replica.id)
        state = _read(path)
        if state is None:
            return
        end_s = time.monotonic() + TERM_GRACE_S + HEALTH_TIMEOUT_S
        while state.keeper_lives and time.monotonic() < end_s:
            _signal(state.keeper_pid, signal.SIGTERM)
            await asyncio.sleep(_LOOK_S)
            self._reap()
        if state.keeper_lives:
            _signal(state.keeper_pid, signal.SIGKILL)
        if state.engine_lives:
            signal_group(state.engine_pid, signal.SIGKILL)
        path.unlink(missing_ok=True)
        if replica.state is not ReplicaState.FAILED:  # the log of a failure is what its operator asks for next
            self._log_file(replica.id).unlink(missing_ok=True)

    async def list(self) -> Sequence[Replica]:
        """What the state files say, checked against the processes; those that start are asked for their health."""
        self._reap()
        states = [state for path in sorted(self._folder.glob("*.json")) if (state := _read(path)) is not None]
        return await asyncio.gather(*(self._look(state) for state in states))

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Broken(f"{self._folder} cannot be made: {error.strerror}; give a --data-dir you may write") from None

    def _state_file(self, replica_id: str) -> Path:
        return self._folder / f"{replica_id}.json"

    def _log_file(self, replica_id: str) -> Path:
        return self._folder / f"{replica_id}.log"

    def _free_port(self) -> int:
        given = {state.port for path in self._folder.glob("*.json") if (state := _read(path)) is not None}
        while True:
            with socket.socket() as probe:
                probe.bind((_HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in given:
                return port

    def _spawn(self, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        try:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "fleetgate.providers.local_shim"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._life_fd,) if self._life_fd >= 0 else (),
                start_new_session=True,
            )
        except OSError as error:
            raise NotNow(f"this machine cannot start another process: {error.strerror}") from None
        self._children.append(keeper)
        assert keeper.stdin is not None
        # Environment and arguments go by a pipe: they may hold secrets, and argv can be read by every user.
        with keeper.stdin as pipe:
            pipe.write(json.dumps(job).encode())
        return keeper

    async def _started(self, spec: ReplicaSpec, keeper: subprocess.Popen[bytes]) -> Replica:
        path = self._state_file(spec.id)
        end_s = time.monotonic() + _KEEPER_START_S_MAX
        # Another process writes the file, so there is nothing to be woken by.
        while (state := _read(path)) is None and keeper.poll() is None and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        state = state or _read(path)
        if state is None:
            keeper.kill()
            raise Broken(f"{spec.deployment}: the keeper of {spec.id} did not start; see this process's own log")
        if state.bad_command:
            path.unlink(missing_ok=True)
            raise BadSpec(f"{spec.deployment}: {state.ended}; correct workload.command")
        return _replica(state, ReplicaState.STARTING)

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]

    async def _look(self, state: LocalReplicaState) -> Replica:
        if state.ended or not state.keeper_lives:
            how = state.ended or "its keeper was killed"
            # An engine that was killed had no time to say why; its last line would only mislead.
            words = self._last_words(state.id) if state.exit_code >= 0 else ""
            return _replica(state, ReplicaState.FAILED, how + words)
        if state.stopping or not state.engine_lives:  # the keeper is about to write how it ended
            return _replica(state, ReplicaState.STOPPING)
        known = (state.id, state.engine_start)
        if known not in self._ready and await _is_healthy(state.port, state.health):
            self._ready.add(known)
        return _replica(state, ReplicaState.READY if known in self._ready else ReplicaState.STARTING)

    def _last_words(self, replica_id: str) -> str:
        try:
            with self._log_file(replica_id).open("rb") as log:
                log.seek(-min(_LOG_TAIL_BYTES, log.seek(0, os.SEEK_END)), os.SEEK_END)
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f"; its last line was: {lines[-1].strip()}" if lines else ""


def _filled(text: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(name, value)
    return text


_decode = msgspec.json.Decoder(LocalReplicaState).decode


def _read(path: Path) -> LocalReplicaState | None:
    """A state file; None when there is none, or what is there was not written by a keeper."""
    try:
        return _decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _replica(state: LocalReplicaState, how: ReplicaState, because: str = "") -> Replica:
    return Replica(
        id=state.id,
        deployment=state.deployment,
        url=state.url,
        state=how,
        fingerprint=state.fingerprint,
        ref=str(state.engine_pid or ""),
        because=because,
    )


def _is_same_process(pid: int, start: int) -> bool:
    """Whether that very process still runs, and not a later one with its number."""
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
    """Whether a GET of the health path is answered with 200."""
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
    """The provider for one data directory."""
    return LocalProvider(settings)
