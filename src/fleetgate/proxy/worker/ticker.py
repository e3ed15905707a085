"""The periodic work of a worker, every 50 ms and once a second, instead of timers."""

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.log import Level
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.ipc.usage_journal import UsageJournal
from fleetgate.proxy.downstream.connection_limits import ConnectionLimits
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.overload.notices import OperatorNotices
from fleetgate.proxy.overload.overload_manager import OverloadManager
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.response.heads import ResponseDefaults
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker, limit_change_message
from fleetgate.proxy.telemetry.access_log import AccessLog
from fleetgate.proxy.telemetry.line_log import DroppedLines
from fleetgate.proxy.transport.connection_pool import IDLE_MAX_S
from fleetgate.proxy.worker.activation import TableActivator

TICK_S = 0.05
SECOND_TICKS = 20
OVERLOAD_TICKS = 5


class Flushed(Protocol):
    """A log that is written once a tick."""

    def flush(self) -> None:
        """Pass the collected lines to the writer."""


class Ticked(msgspec.Struct, frozen=True):
    """The parts of a worker with periodic work."""

    active: ActiveTable
    activator: TableActivator
    registry: RequestRegistry
    health: PassiveHealthChecker
    tracker: CapacityTracker
    limits: ConnectionLimits
    overload: OverloadManager
    notices: OperatorNotices
    journal: UsageJournal
    defaults: ResponseDefaults
    logs: tuple[Flushed, ...]
    dropped_lines: DroppedLines


class Ticker:
    """One worker's ticker. Shape: `corrects_limits` says whether this worker corrects the limits for all."""

    def __init__(
        self,
        parts: Ticked,
        shared: SharedMemory,
        worker: int,
        outputs: tuple[EventSpool, AccessLog],
        corrects_limits: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._parts = parts
        self._shared = shared
        self._worker = worker
        self._spool, self._access_log = outputs
        self._corrects_limits = corrects_limits
        self._clock = clock
        self._ticks = 0
        self._epoch_s = 0

    def tick(self) -> None:
        """Every 50 ms: deadlines, ejections of other workers, logs. Cost: 10 µs and 0.1 µs a request in flight."""
        parts, now_s = self._parts, self._clock()
        self._ticks += 1
        self._shared.set(self._worker, WorkerCell.HEARTBEAT_MS, int(now_s * 1000))
        epoch_s = int(time.time())
        if epoch_s != self._epoch_s:
            self._epoch_s = epoch_s
            parts.defaults.set_date(epoch_s)
        every_second = self._ticks % SECOND_TICKS == 0
        furthest: dict[int, int] = {}
        parts.registry.tick(now_s, furthest if every_second else None)
        parts.health.tick(now_s, every_second)
        parts.activator.update_deployments(int(now_s * 1000), every_second)
        if parts.registry.has_waiting:
            parts.registry.wake()  # a breaker's back-off may be over, which causes no event
        if every_second:
            self._every_second(furthest, now_s)
        for log in parts.logs:
            log.flush()

    def check_overload(self) -> None:
        """Check the overload manager, four times a second."""
        if self._ticks % OVERLOAD_TICKS:
            return
        parts = self._parts
        state = parts.overload.check(parts.limits.count, parts.limits.bodies.is_tight)
        parts.limits.apply(state)
        self._shared.set(self._worker, WorkerCell.SHORT, state.bits)
        for kind, message in state.notices:
            parts.notices.emit(kind, message)

    def _every_second(self, furthest: dict[int, int], now_s: float) -> None:
        parts = self._parts
        self._learn(furthest, now_s)
        parts.journal.check(now_s)
        self._shared.set(self._worker, WorkerCell.JOURNAL_SHORT, parts.journal.is_short)
        self._shared.set(self._worker, WorkerCell.ROWS_LOST, parts.journal.lost)
        parts.dropped_lines.publish()
        for connection in parts.limits.connections:
            connection.tick(now_s)
        for endpoint in parts.active.current.endpoints.values():
            endpoint.pool.close_idle(now_s - IDLE_MAX_S)
            endpoint.pool.follow_name(now_s)

    def _learn(self, furthest: dict[int, int], now_s: float) -> None:
        """Speeds from this worker's streams; limits, in the one worker that does it for all, from all workers."""
        self._parts.tracker.learn_speeds(furthest, now_s)
        if not self._corrects_limits():
            return
        for name, change in self._parts.tracker.correct_limits(int(now_s * 1000)):
            message = limit_change_message(name, change)
            self._spool.add(EventRecord("Deployment", name, message))
            self._access_log.event(Level.INFO, "limit_changed", message, deployment=name)
