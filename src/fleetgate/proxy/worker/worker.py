"""A worker: one event loop, one thread, the sockets it was given. Started by the supervisor, ended by SIGTERM."""

import asyncio
import gc
import mmap
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.model import DEPLOYMENTS_MAX, Snapshot
from fleetgate.ipc.event_spool import EventRecord
from fleetgate.ipc.file_locks import LockFile
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell, layout
from fleetgate.policies import plugins
from fleetgate.proxy.downstream.authenticator import Authenticator
from fleetgate.proxy.downstream.client_connection import ClientConnection
from fleetgate.proxy.downstream.idempotency import remove_expired
from fleetgate.proxy.downstream.listener import Listener
from fleetgate.proxy.downstream.server_tls import DevelopmentTls, ServerTls
from fleetgate.proxy.health.active_health import HealthChecker
from fleetgate.proxy.health.resume_probe import ResumeProbe
from fleetgate.proxy.routing.routing_table import RoutingTable, RoutingTableBuilder
from fleetgate.proxy.snapshot.key_validity import KeyValidity
from fleetgate.proxy.snapshot.rollout import Rollout
from fleetgate.proxy.snapshot.snapshot_file import EMPTY, SnapshotFile
from fleetgate.proxy.telemetry.access_log import AccessLog
from fleetgate.proxy.telemetry.ops_server import HEAD_BYTES_MAX, OpsServer
from fleetgate.proxy.transport import tcp_info as tcp
from fleetgate.proxy.transport.fault_switch import FaultSwitch
from fleetgate.proxy.worker.config import ENV, RETIRE, WorkerConfig
from fleetgate.proxy.worker.drain import AT_ONCE, RETIRED, DrainPolicy, drain, stopping
from fleetgate.proxy.worker.generations import Generations
from fleetgate.proxy.worker.services import SWEEP_S, Hub

SNAPSHOT_EVERY = 2  # sweeps: a change is in use within 100 ms
TIDY_EVERY = 1200  # sweeps: once a minute
PROBER_LOCK = DEPLOYMENTS_MAX  # the byte after the Deployments' own in the lock file
EXIT_OTHER_LAYOUT = 3


class WorkerProcess:
    """Wires one worker and runs it until it has drained."""

    def __init__(self, config: WorkerConfig) -> None:
        data_dir = Path(config.data_dir)
        memory = mmap.mmap(config.board_fd, SharedMemory.bytes_needed(config.workers))
        self.board = SharedMemory(memoryview(memory), config.workers)
        locks = LockFile(data_dir / "ledger.lock")
        ledger = Ledger(self.board, config.index, locks.lock, locks.unlock)
        self.overlap = Generations(self.board, config.index, config.serving or config.workers, ledger)
        pepper = (data_dir / "pepper").read_bytes() if config.auth == "keys" else None
        self.config = config
        self.hub = Hub(config, self.board, ledger, AccessLog(config.access_log, config.index), Authenticator(pepper))
        self.hub.maker = RoutingTableBuilder(self.hub.telemetry, config.region, (data_dir / "seal.key").read_bytes)
        self.hub.tables = RoutingTable(EMPTY, self.hub.maker, None, 0.0)
        self._snapshots = SnapshotFile(data_dir)
        self._rollout = Rollout(self._snapshots, self.board, config.index, self, careful=config.canary)
        self.overlap.on_change = self._counts_with
        self._locks = locks
        self._freshness = self.hub.freshness = KeyValidity(data_dir, self.board, config.max_stale_s)
        self._using = EMPTY
        self._prober = HealthChecker(self.hub, lambda: locks.try_lock(PROBER_LOCK))
        self.hub.corrects_limits = lambda: self._prober.mine
        self._tls = self._server_tls() if config.tls_listen_fd >= 0 else None
        self._harming = FaultSwitch(self.hub, data_dir)
        self._leave = self._stop = stopping(config.lb_grace_s, config.grace_s)
        self._refused = ""
        self._sweeps = 0
        self._stopped: asyncio.Event

    def _server_tls(self) -> ServerTls | DevelopmentTls:
        if self.config.tls_cert:
            return ServerTls(Path(self.config.tls_cert), Path(self.config.tls_key))
        directory = Path(self.config.data_dir) / "tls"
        return DevelopmentTls(directory, lambda name: name.encode() in self.hub.tables.sites)

    async def run(self) -> None:
        """Serve until SIGTERM, then drain."""
        hub, config = self.hub, self.config
        loop = hub.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._go, self._stop)
        loop.add_signal_handler(RETIRE, self._go, RETIRED)
        if config.life_fd >= 0:
            loop.add_reader(config.life_fd, self._orphaned)
        if config.wake_fd >= 0:
            loop.add_reader(config.wake_fd, self._woken)
        hub.journal.begin(loop)
        hub.guards.begin(SWEEP_S)
        self._look_at_keys()
        self._rollout.start(hub.clock())
        self._say_refusals()
        hub.guards.sweep()
        ops = await self._listen_for_operations() if config.ops_listen_fd >= 0 else None
        sweeper = loop.create_task(self._sweep_forever())
        await self._until_it_may_serve()
        if self._stopped.is_set():
            return
        doors = [await self._listen(config.listen_fd, None)]
        if self._tls is not None:
            doors.append(await self._listen(config.tls_listen_fd, self._tls))
        prober = loop.create_task(self._prober.run())
        prefill = loop.create_task(ResumeProbe(hub, lambda: self._prober.mine).run())
        # What is there now stays: the collector need not walk it again. HOTPATH.md rule 13.
        gc.collect()
        gc.freeze()
        self.board.set(config.index, WorkerCell.PID, os.getpid())
        self.board.set(config.index, WorkerCell.ACCEPTING, 1)
        await self._stopped.wait()
        prober.cancel()
        prefill.cancel()
        self._prober.mine = False
        self._locks.unlock(PROBER_LOCK)
        await drain(hub, doors, lambda: self._leave)
        sweeper.cancel()
        if ops is not None:
            ops.close()
        hub.log.close()
        hub.journal.close()
        if hub.recorder is not None:
            hub.recorder.log.close()
            if hub.recorder.log.dropped:
                self.hub.say(f"--record: the disk was too slow, and {hub.recorder.log.dropped} records are missing")
        hub.process_log.drain()

    async def _listen(self, fd: int, tls: ServerTls | DevelopmentTls | None) -> Listener:
        tcp.limit_unsent(fd)
        door = Listener(fd, tls.context if tls else None, lambda: ClientConnection(self.hub))
        return await self.hub.guards.watch(door).open()

    async def _listen_for_operations(self) -> asyncio.Server:
        listener = socket.socket(fileno=self.config.ops_listen_fd)
        server = OpsServer(self.board)
        return await asyncio.start_server(server.serve, sock=listener, limit=HEAD_BYTES_MAX)

    async def _until_it_may_serve(self) -> None:
        """Wait for the other generation to count with this one, and for a Snapshot no older than theirs."""
        overlap = self.overlap
        while not (overlap.may_serve() and self.hub.tables.version >= overlap.versions()):
            if self._stopped.is_set():
                return
            await asyncio.sleep(SWEEP_S)

    def _counts_with(self, columns: range) -> None:
        self.hub.others = [column for column in columns if column != self.config.index]

    def _go(self, leave: DrainPolicy) -> None:
        self._leave = leave
        self._stopped.set()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sweeps += 1
            self.overlap.look()
            if self._sweeps % SNAPSHOT_EVERY == 0 or self._rollout.is_urgent:
                self.hub.guards.tend(self._look_for_snapshot)
            if self._sweeps % SNAPSHOT_EVERY == 0:
                self.hub.guards.tend(self._look_at_files)
            self.hub.guards.sweep()

    def _look_at_files(self) -> None:
        if self._sweeps % TIDY_EVERY == 0 and self._prober.mine:
            self.hub.loop.run_in_executor(None, remove_expired, Path(self.config.data_dir))
        self._look_at_keys()
        self._harming.look()
        if self.hub.maker.upstream_tls is not None:
            self.hub.maker.upstream_tls.reload_if_changed()
        if self._tls is not None:
            self._tls.reload_if_changed()
            self._tell_of_expiry(self._tls)

    def _look_at_keys(self) -> None:
        freshness = self._freshness
        if freshness.look(self.hub.clock()):
            self.take(self._using)
            if freshness.stale:
                self.hub.say("the control plane was not heard for --max-stale-s; API keys are refused until it is")

    def _tell_of_expiry(self, tls: ServerTls | DevelopmentTls) -> None:
        if self._prober.mine and (sentence := tls.alarm(self.hub.epoch_s())):  # one worker tells for all
            self.hub.spool.add(EventRecord("Certificate", "client-listener", sentence))
            self.hub.say(sentence)

    def _look_for_snapshot(self) -> None:
        self._rollout.look(self.hub.clock())
        self._say_refusals()

    # --- Snapshots: what the rollout asks for ---

    def take(self, snapshot: Snapshot) -> bool:
        """Use a Snapshot from now on; False, and a line in the log, where it cannot be used."""
        try:
            tables = RoutingTable(self._freshness.usable(snapshot), self.hub.maker, self.hub.tables, self.hub.clock())
        except Exception as error:
            self.hub.say(f"Snapshot {snapshot.version} cannot be used and the last good one stays: {error!r}")
            return False
        self._using = snapshot
        self.hub.use(tables)
        return True

    def keep(self, data: bytes, version: int) -> None:
        """Write the last good copy in a thread: it waits for the disk."""

        def write() -> None:
            try:
                self._snapshots.keep(data, version)
            except OSError as error:
                self.hub.say(f"there is no copy of Snapshot {version}: {error.strerror}; make room on the disk")

        self.hub.loop.run_in_executor(None, write)

    def tell(self, version: int, sentence: str) -> None:
        """An Event, and a line in the log."""
        self.hub.spool.add(EventRecord("Snapshot", str(version), sentence))
        self.hub.say(sentence)

    def _say_refusals(self) -> None:
        refused = self._snapshots.refused or self._freshness.refused
        if refused != self._refused:
            self._refused = refused
            self.hub.say(self._refused or "the files that were refused are good again")

    def _orphaned(self) -> None:
        """The supervisor is dead: a worker must not outlive it, so there is no grace."""
        self._go(AT_ONCE)

    def _woken(self) -> None:
        os.read(self.config.wake_fd, 4096)
        self.hub.wake()


def main() -> None:
    """Run a worker from the environment variable that the supervisor set."""
    config = msgspec.json.decode(os.environ[ENV], type=WorkerConfig)
    if config.layout not in ("", layout()):
        sys.stderr.write("this version lays shared memory out in another way; restart `fleetgate up` to change to it\n")
        sys.exit(EXIT_OTHER_LAYOUT)
    plugins.load()  # the control process tells of those that cannot be used
    worker = WorkerProcess(config)
    worker.hub.process_log.take_over()
    uvloop.run(worker.run())
