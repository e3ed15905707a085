"""The control process: `python -m fleetgate.control.process`, started by the supervisor."""

import asyncio
import fcntl
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvicorn
import uvloop

from fleetgate.control.api.app import create_app
from fleetgate.control.config import ENV, ControlConfig
from fleetgate.control.context import Control, StartedProcess, newest_version_in_use
from fleetgate.control.data_dir import (
    API_ADDRESS,
    DataDir,
    DataDirUnusable,
    open_data_dir,
    unusable_sentence,
    write_whole,
)
from fleetgate.control.faults import FaultService
from fleetgate.control.reconciler.reconciler import Reconciler
from fleetgate.control.resources.apply import ResourceWriter
from fleetgate.control.resources.config_file import apply_file
from fleetgate.control.resources.egress import parse_ranges
from fleetgate.control.revocation_sync import merge_revoked
from fleetgate.control.snapshot.publisher import Publisher
from fleetgate.control.snapshot.replica_endpoints import ReplicaEndpoints
from fleetgate.control.store.database import Database
from fleetgate.control.store.repository import load_resources
from fleetgate.control.telemetry.event_recorder import EventRecorder, heartbeat, record_changes
from fleetgate.control.telemetry.log import log_as_json
from fleetgate.control.usage.ingest import UsageIngest
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory
from fleetgate.manifests import Unreadable
from fleetgate.policies import plugins
from fleetgate.providers.base import Settings, discover

PREDECESSOR_S_MAX = 5.0  # a predecessor needs time to stop after its supervisor was killed
STOP_S_MAX = 2  # a response that takes longer belongs to a client that hangs
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared here, not bound

log = structlog.get_logger()


def main() -> int:
    """Run until SIGTERM or the end of the supervisor and return the exit code, 1 for an unusable configuration."""
    log_as_json()
    os.umask(0o077)  # only the owner may read files of the data directory, the database included
    text = os.environ.get(ENV)
    if text is None:
        return _fail([f"{ENV} is not set; start the control process with `fleetgate up`"])
    try:
        config = msgspec.json.decode(text, type=ControlConfig)
        parse_ranges(config.egress_allow)
    except (msgspec.MsgspecError, ValueError) as error:
        return _fail([f"{ENV} is not valid ({error}); start the control process with `fleetgate up`"])
    try:
        data_dir = open_data_dir(Path(config.data_dir))
        with _exclusive(data_dir):
            database = Database(data_dir.database)
            database.migrate()
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_run(config, data_dir, database))
            finally:
                database.close()
    except DataDirUnusable as error:
        return _fail([str(error)])
    except Unreadable as error:
        return _fail(error.messages)
    return 0


async def _run(config: ControlConfig, data_dir: DataDir, database: Database) -> None:
    writer = ResourceWriter(database, data_dir, parse_ranges(config.egress_allow))
    publisher = Publisher(database, data_dir, config.egress_allow, lambda: replicas.ready())
    control = Control(config, data_dir, database, writer, publisher)
    control.shared_memory = _map_shared_memory(config)
    publisher.newest_version_in_use = lambda: newest_version_in_use(control.shared_memory)
    for problem in plugins.load():
        log.warning("plugin_unusable", reason=problem)
        control.record("Plugin", problem.split()[1], problem)
    settings = Settings(data_dir=data_dir.path, life_fd=config.life_fd)
    providers = {name: make(settings) for name, make in discover().items()}
    reconciler = Reconciler(lambda: publisher.managed, providers, publisher.wake, control.record)
    replicas = ReplicaEndpoints(reconciler.endpoints)
    if config.config_file and not (
        control.shared_memory is not None and control.shared_memory.control_plane[ControlPlaneCell.CONFIGURED]
    ):
        await _apply_config(control, config.config_file)
    replicas.carry(publisher.current, await asyncio.to_thread(publisher.load_managed), control.shared_memory)
    await asyncio.to_thread(publisher.publish)
    control.started = StartedProcess(publisher.version, time.monotonic())
    listener = socket.socket(fileno=config.api_fd)
    _write_address(data_dir, listener)
    fault_service = FaultService(control)
    server = _Server(
        uvicorn.Config(
            create_app(control, [_host_of(config.api_listen), *config.api_hosts], fault_service),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=STOP_S_MAX,
        )
    )
    _stop_at_signals(server, config.life_fd)
    jobs: list[Coroutine[Any, Any, None]] = [
        server.serve(sockets=[listener]),
        publisher.run(reconciler.wake),
        reconciler.run(),
        replicas.drop_carried(publisher.wake),
        fault_service.run(),
    ]
    usage_ingest = UsageIngest(data_dir.path, database)
    if control.shared_memory is not None:
        jobs.append(usage_ingest.run())
        spool = EventSpool(data_dir.path)
        jobs.append(heartbeat(control.shared_memory))
        jobs.append(merge_revoked(control))
        recorder = EventRecorder(control.shared_memory)
        jobs.append(record_changes(recorder, spool, lambda: publisher.current, control.record))
    log.info("control_started", snapshot_version=publisher.version, pid=os.getpid())
    await _first_of(jobs)
    with suppress(OSError, DataDirUnusable):  # the last rows of the workers; if this fails the next start takes them
        await asyncio.to_thread(usage_ingest.take)
    log.info("control_stopped")


async def _apply_config(control: Control, path: str) -> None:
    """Apply the --config file at the start of `up` and after a reload. Other restarts keep later changes of the API.

    Raises: `Unreadable` if the file has mistakes and the store is empty.
    """
    try:
        await apply_file(path, control.writer)
        if control.shared_memory is not None:
            control.shared_memory.control_plane[ControlPlaneCell.CONFIGURED] = 1
    except Unreadable as error:
        # A file that is being edited must not stop the API when the control process restarts at that moment.
        with control.database.read() as connection:
            if not load_resources(connection):
                raise
        sentence = f"{path} was not applied and the stored resources stay in use: {'; '.join(error.messages)}"
        log.error("config_not_applied", reason=sentence)
        control.record("Config", Path(path).name, f"{sentence}.")


async def _first_of(jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run jobs until one ends, then cancel the others. After a failure the supervisor starts the process again."""
    tasks = [asyncio.create_task(job) for job in jobs]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


class _Server(uvicorn.Server):
    """Uvicorn without its own signal handling, which would end the process before its cleanup."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handler."""
        yield


def _stop_at_signals(server: uvicorn.Server, life_fd: int) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    def supervisor_gone() -> None:
        if not os.read(life_fd, 1):
            loop.remove_reader(life_fd)
            stop()

    loop.add_signal_handler(signal.SIGTERM, stop)
    # Ctrl-C reaches every process of the group; the supervisor decides in which order they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if life_fd >= 0:
        loop.add_reader(life_fd, supervisor_gone)


def _map_shared_memory(config: ControlConfig) -> SharedMemory | None:
    if config.board_fd < 0:
        return None
    memory = mmap.mmap(config.board_fd, SharedMemory.bytes_needed(config.workers))
    return SharedMemory(memoryview(memory), config.workers)


@contextmanager
def _exclusive(data_dir: DataDir) -> Iterator[None]:
    """Lock the data directory. The kernel releases the lock when the process ends in any way."""
    path = data_dir.path / "control.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirUnusable(unusable_sentence(data_dir.path, error)) from error
    try:
        deadline_s = time.monotonic() + PREDECESSOR_S_MAX
        while not _try_lock(descriptor):
            if time.monotonic() > deadline_s:
                raise DataDirUnusable(
                    f"the data directory {data_dir.path} is in use by another Fleetgate; stop it or give another "
                    f"directory with --data-dir"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_address(data_dir: DataDir, listener: socket.socket) -> None:
    """Write the address of the API for a CLI that knows only --data-dir."""
    host, port = listener.getsockname()[:2]
    host = _WILDCARDS.get(host, host)
    host = f"[{host}]" if ":" in host else host
    try:
        write_whole(data_dir.path / API_ADDRESS, f"http://{host}:{port}\n".encode())
    except OSError as error:
        raise DataDirUnusable(unusable_sentence(data_dir.path, error)) from error


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _fail(messages: Sequence[str]) -> int:
    with suppress(BrokenPipeError):
        for message in messages:
            sys.stderr.write(f"{message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
