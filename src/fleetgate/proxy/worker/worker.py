"""A worker: one event loop, one thread, the sockets it was given. Started by the supervisor, ended by SIGTERM.

This is the composition root: it alone knows all services of the data plane.
"""

import asyncio
import gc
import mmap
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import msgspec
import uvloop

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.model import DEPLOYMENTS_MAX
from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.file_locks import LockFile
from fleetgate.ipc.log import Log
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell, layout
from fleetgate.policies import plugins
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.downstream.server_tls import DevelopmentTls, ServerTls
from fleetgate.proxy.overload.watchdog import Watchdog
from fleetgate.proxy.telemetry.ops_server import HEAD_BYTES_MAX, OpsServer
from fleetgate.proxy.transport import tcp_info
from fleetgate.proxy.transport.network import Network
from fleetgate.proxy.worker.assembly import DataPlane, MachineParts
from fleetgate.proxy.worker.config import ENV, RETIRE, WorkerConfig
from fleetgate.proxy.worker.drain import AT_ONCE, RETIRED, DrainPolicy, stopping
from fleetgate.proxy.worker.generations import Generations
from fleetgate.proxy.worker.ticker import TICK_S

SNAPSHOT_TICKS = 2  # a change is in use within 100 ms
TIDY_TICKS = 1200  # once a minute
PROBER_LOCK = DEPLOYMENTS_MAX  # the byte after the Deployments' own in the lock file
EXIT_OTHER_LAYOUT = 3


class WorkerProcess:
    """Runs one worker until it has drained."""

    def __init__(self, config: WorkerConfig) -> None:
        data_dir = Path(config.data_dir)
        memory = mmap.mmap(config.board_fd, SharedMemory.bytes_needed(config.workers))
        self.shared = SharedMemory(memoryview(memory), config.workers)
        self._locks = LockFile(data_dir / "ledger.lock")
        ledger = Ledger(self.shared, config.index, self._locks.lock, self._locks.unlock)
        self.generations = Generations(self.shared, config.index, config.serving or config.workers, ledger)
        self.config = config
        self.log = Log(worker=config.index)
        self._spool = EventSpool(data_dir)
        self._machine = MachineParts(
            config=config,
            shared=self.shared,
            ledger=ledger,
            log=self.log,
            spool=self._spool,
            try_prober_lock=lambda: self._locks.try_lock(PROBER_LOCK),
        )
        self._policy = self._stop = stopping(config.lb_grace_s, config.grace_s)
        self._ticks = 0
        self.plane: DataPlane
        self._watchdog: Watchdog
        self._tls: ServerTls | DevelopmentTls | None = None
        self._stopped: asyncio.Event

    def _server_tls(self) -> ServerTls | DevelopmentTls | None:
        if self.config.tls_listen_fd < 0:
            return None
        if self.config.tls_cert:
            return ServerTls(Path(self.config.tls_cert), Path(self.config.tls_key))
        directory = Path(self.config.data_dir) / "tls"
        return DevelopmentTls(directory, lambda name: name.encode() in self.plane.active.current.gateways)

    def start_plane(self, loop: asyncio.AbstractEventLoop, network: Network | None = None) -> DataPlane:
        """Make the services that will run in this loop, and dial through `network`, by default through sockets."""
        plane = self.plane = DataPlane(self._machine, loop, network)
        self.generations.follow(plane.registry.count_with)
        plane.journal.begin(loop)
        return plane

    async def run(self) -> None:
        """Serve until SIGTERM, then drain."""
        config, loop = self.config, asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        plane = self.start_plane(loop)
        self._tls = self._server_tls()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, self._stop)
        loop.add_signal_handler(RETIRE, self._leave, RETIRED)
        if config.life_fd >= 0:
            loop.add_reader(config.life_fd, self._orphaned)
        if config.wake_fd >= 0:
            loop.add_reader(config.wake_fd, self._woken)
        loop.set_exception_handler(lambda _, context: plane.boundary.on_loop_error(context))
        self._watchdog = Watchdog(TICK_S, plane.note_lag)
        plane.snapshots.start(loop.time())
        self._tick()
        ops = await self._listen_for_operations() if config.ops_listen_fd >= 0 else None
        ticking = loop.create_task(self._tick_forever())
        await self._until_it_may_serve()
        if self._stopped.is_set():
            return
        listeners = [await self._listen(config.listen_fd, None)]
        if self._tls is not None:
            listeners.append(await self._listen(config.tls_listen_fd, self._tls))
        probing = [loop.create_task(plane.prober.run()), loop.create_task(plane.resume_probe.run())]
        # These objects stay for the life of the process: exclude them from garbage collection.
        gc.collect()
        gc.freeze()
        self.shared.set(config.index, WorkerCell.PID, os.getpid())
        self.shared.set(config.index, WorkerCell.ACCEPTING, 1)
        await self._stopped.wait()
        for task in probing:
            task.cancel()
        plane.prober.retire()
        self._locks.unlock(PROBER_LOCK)
        await plane.drain.run(listeners, lambda: self._policy, has_tls=config.tls_listen_fd >= 0)
        ticking.cancel()
        if ops is not None:
            ops.close()
        plane.close()

    async def _listen(self, fd: int, tls: ServerTls | DevelopmentTls | None) -> Listener:
        tcp_info.limit_unsent(fd)
        loop = asyncio.get_running_loop()
        make = partial(ClientConnection, self.plane.connection_services, loop)
        listener = Listener(fd, tls.context if tls else None, make)
        return await self.plane.limits.pause_when_full(listener).open()

    async def _listen_for_operations(self) -> asyncio.Server:
        listener = socket.socket(fileno=self.config.ops_listen_fd)
        server = OpsServer(self.shared)
        return await asyncio.start_server(server.serve, sock=listener, limit=HEAD_BYTES_MAX)

    async def _until_it_may_serve(self) -> None:
        """Wait until the other generation includes this one in its sums, and for a Snapshot no older than theirs."""
        generations, active = self.generations, self.plane.active
        while not (generations.may_serve() and active.current.version >= generations.newest_version()):
            if self._stopped.is_set():
                return
            await asyncio.sleep(TICK_S)

    def _leave(self, policy: DrainPolicy) -> None:
        self._policy = policy
        self._stopped.set()

    def _orphaned(self) -> None:
        """Stop without grace: the supervisor is dead, and no worker may outlive it."""
        self._leave(AT_ONCE)

    def _woken(self) -> None:
        os.read(self.config.wake_fd, 4096)
        self.plane.registry.wake()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._tick()

    def _tick(self) -> None:
        plane, run = self.plane, self.plane.boundary.run
        self._ticks += 1
        self._watchdog.beat()
        self.generations.tick()
        if self._ticks % SNAPSHOT_TICKS == 0 or plane.snapshots.is_urgent:
            run(plane.snapshots.tick)
        if self._ticks % SNAPSHOT_TICKS == 0:
            run(self._check_files)
        run(plane.ticker.tick)
        run(plane.ticker.check_overload)

    def _check_files(self) -> None:
        plane = self.plane
        if self._ticks % TIDY_TICKS == 0 and plane.prober.is_prober:
            asyncio.get_running_loop().run_in_executor(None, plane.idempotency.remove_expired)
        plane.snapshots.check_keys()
        plane.fault_switch.check(plane.active.current)
        if plane.builder.upstream_tls is not None:
            plane.builder.upstream_tls.reload_if_changed()
        if self._tls is not None:
            self._tls.reload_if_changed()
            self._warn_of_expiry(self._tls)

    def _warn_of_expiry(self, tls: ServerTls | DevelopmentTls) -> None:
        if self.plane.prober.is_prober and (message := tls.alarm(time.time())):  # one worker warns for all
            self._spool.add(EventRecord("Certificate", "client-listener", message))
            self.log.warning("worker", message)


def main() -> None:
    """Run a worker from the environment variable that the supervisor set."""
    config = msgspec.json.decode(os.environ[ENV], type=WorkerConfig)
    if config.layout not in ("", layout()):
        sys.stderr.write("this version has another layout of shared memory; restart `fleetgate up` to change to it\n")
        sys.exit(EXIT_OTHER_LAYOUT)
    plugins.load()  # the control process tells of those that cannot be used
    worker = WorkerProcess(config)
    worker.log.take_over()
    uvloop.run(worker.run())
