"""Carries out the rollout's decisions in a worker, and logs refused Snapshots."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from fleetgate.core.model import Snapshot
from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.log import Log
from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.proxy.routing.routing_table import RoutingTable, RoutingTableBuilder
from fleetgate.proxy.snapshot.key_validity import KeyValidity
from fleetgate.proxy.snapshot.rollout import Rollout
from fleetgate.proxy.snapshot.snapshot_file import EMPTY, SnapshotFile
from fleetgate.proxy.worker.config import WorkerConfig

MakeTable = Callable[[RoutingTableBuilder, RoutingTable], RoutingTable]


class WorkerSnapshots:
    """The Snapshots of one worker. Shape: `activate` makes a table and uses it."""

    def __init__(
        self,
        config: WorkerConfig,
        outputs: tuple[Log, EventSpool],
        shared: SharedMemory,
        validity: KeyValidity,
        activate: Callable[[MakeTable], None],
        clock: Callable[[], float],
    ) -> None:
        self._log, self._spool = outputs
        self._validity = validity
        self._activate = activate
        self._clock = clock
        self._file = SnapshotFile(Path(config.data_dir))
        self._rollout = Rollout(self._file, shared, config.index, self, careful=config.canary)
        self._using = EMPTY
        self._refused = ""

    @property
    def is_urgent(self) -> bool:
        """Whether to check sooner than usual."""
        return self._rollout.is_urgent

    def start(self, now_s: float) -> None:
        """Use the present Snapshot."""
        self.check_keys()
        self._rollout.start(now_s)
        self._log_refusals()

    def tick(self) -> None:
        """Check for a new Snapshot, ten times a second."""
        self._rollout.tick(self._clock())
        self._log_refusals()

    def check_keys(self) -> None:
        """Check the validity of keys, ten times a second."""
        if self._validity.check(self._clock()):
            self.take(self._using)
            if self._validity.stale:
                message = "the control plane was not heard from for --max-stale-s; API keys are refused until it is"
                self._log.warning("worker", message)

    def _log_refusals(self) -> None:
        refused = self._file.refused or self._validity.refused
        if refused != self._refused:
            self._refused = refused
            self._log.warning("worker", refused or "the refused files are valid again")

    # --- for the rollout ---

    def take(self, snapshot: Snapshot) -> bool:
        """Use a Snapshot from now on; False, and a line in the log, if it cannot be used."""

        def make(builder: RoutingTableBuilder, last: RoutingTable) -> RoutingTable:
            return RoutingTable(self._validity.usable(snapshot), builder, last, self._clock())

        try:
            self._activate(make)
        except Exception as error:
            message = f"Snapshot {snapshot.version} cannot be used, and the last good one stays in use: {error!r}"
            self._log.error("worker", message)
            return False
        self._using = snapshot
        return True

    def keep(self, data: bytes, version: int) -> None:
        """Write the last good copy in a thread: it waits for the disk."""

        def write() -> None:
            try:
                self._file.keep(data, version)
            except OSError as error:
                message = f"no copy of Snapshot {version} was kept: {error.strerror}; free space on the disk"
                self._log.warning("worker", message)

        asyncio.get_running_loop().run_in_executor(None, write)

    def emit_event(self, version: int, message: str) -> None:
        """Emit an Event and a log line about a version."""
        self._spool.add(EventRecord("Snapshot", str(version), message))
        self._log.warning("worker", message)
