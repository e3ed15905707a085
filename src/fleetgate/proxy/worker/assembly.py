"""Makes the services of one worker and gives each what it uses. Only the worker knows all of them."""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.fault_file import FaultFile
from fleetgate.ipc.log import Level, Log
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.ipc.usage_journal import UsageJournal
from fleetgate.proxy import transport
from fleetgate.proxy.downstream.authenticator import Authenticator
from fleetgate.proxy.downstream.client_connection import ConnectionServices
from fleetgate.proxy.downstream.connection_limits import (
    BODY_BUDGET_BYTES_MIN,
    BODY_SHARE,
    BodyBudget,
    ConnectionLimits,
)
from fleetgate.proxy.downstream.idempotency import IdempotencyStore
from fleetgate.proxy.downstream.local_responses import LocalResponder
from fleetgate.proxy.downstream.policy_filter import PolicyFilter
from fleetgate.proxy.downstream.request_authorizer import RequestAuthorizer
from fleetgate.proxy.downstream.request_intake import RequestIntake
from fleetgate.proxy.health.active_health import HealthChecker
from fleetgate.proxy.health.event_messages import DeploymentEvents
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.health.poison_detector import PoisonDetector
from fleetgate.proxy.health.resume_probe import ResumeProbe
from fleetgate.proxy.overload.notices import OperatorNotices
from fleetgate.proxy.overload.overload_manager import OverloadManager
from fleetgate.proxy.request.attempt import AttemptServices
from fleetgate.proxy.request.attempts import AttemptEffects
from fleetgate.proxy.request.handler import REVOKED, RequestHandler
from fleetgate.proxy.request.outcome import OutcomeRecorder
from fleetgate.proxy.request.placement import Placer
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.reservation import CapacityAccounts
from fleetgate.proxy.request.response.heads import ResponseDefaults
from fleetgate.proxy.request.services import HandlerServices
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.fault_switch import FaultSwitch
from fleetgate.proxy.routing.routing_table import RoutingTable, RoutingTableBuilder
from fleetgate.proxy.snapshot.key_validity import KeyValidity
from fleetgate.proxy.snapshot.snapshot_file import EMPTY
from fleetgate.proxy.telemetry.access_log import AccessLog
from fleetgate.proxy.telemetry.decision_log import DecisionLog
from fleetgate.proxy.telemetry.line_log import DroppedLines, LineLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetricsCache
from fleetgate.proxy.transport.network import Network, SocketNetwork
from fleetgate.proxy.worker.activation import TableActivator
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.proxy.worker.drain import Drain
from fleetgate.proxy.worker.error_boundary import ErrorBoundary
from fleetgate.proxy.worker.services import Tasks, request_ids
from fleetgate.proxy.worker.snapshots import WorkerSnapshots
from fleetgate.proxy.worker.ticker import Ticked, Ticker


class MachineParts(msgspec.Struct, frozen=True):
    """What a worker shares with the other processes of its machine."""

    config: WorkerConfig
    shared: SharedMemory
    ledger: Ledger
    log: Log
    spool: EventSpool
    try_prober_lock: Callable[[], bool]


class DataPlane:
    """The services of one worker, made in the loop that will run them."""

    def __init__(self, machine: MachineParts, loop: asyncio.AbstractEventLoop, network: Network | None = None) -> None:
        config, shared = machine.config, machine.shared
        self._machine = machine
        self._clock = loop.time
        self._data_dir = Path(config.data_dir)
        self._network = network or SocketNetwork(loop)
        self._tasks, self._ids = Tasks(loop), request_ids()
        self._estimates = TokenEstimates()
        self.metrics = WorkerMetrics(shared, config.index)
        self.boundary = ErrorBoundary(machine.log, self.metrics)
        self.defaults = ResponseDefaults(self.boundary.report)
        self.notices = OperatorNotices(machine.log, machine.spool, config.index, self._clock)
        self._make_logs()
        self._make_routing()
        self._make_requests(loop)
        self._make_connections()
        self._make_upkeep()

    def _make_logs(self) -> None:
        config, metrics = self._machine.config, self.metrics
        self.access_log = AccessLog(config.access_log, config.index)
        records = config.record != "off"
        self.decisions = DecisionLog(config.record, config.region, config.index) if records else None
        self.journal = UsageJournal(self._data_dir, partial(self._machine.log.warning, "worker"))
        self._lags = metrics.counter("fleetgate_loop_lags_total", {})
        self._lag_ms = metrics.counter("fleetgate_loop_lag_milliseconds_total", {})

    def _make_routing(self) -> None:
        config, shared, ledger = self._machine.config, self._machine.shared, self._machine.ledger
        self._cache = RequestMetricsCache(self.metrics)
        self._work_ledger = WorkLedger(shared, config.index, ledger)
        self.tracker = CapacityTracker(shared, self._work_ledger)
        self.builder = RoutingTableBuilder(
            self._cache,
            config.region,
            (self._data_dir / "seal.key").read_bytes,
            self._update_view,
            records_decisions=self.decisions is not None,
        )
        self.active = ActiveTable(RoutingTable(EMPTY, self.builder, None, 0.0))
        faults = FaultFile(self._data_dir)
        self.fault_switch = FaultSwitch(lambda: faults.now(time.time()), self.metrics)

    def _update_view(self, deployment: DeploymentState) -> None:
        self.tracker.update_view(deployment, int(self._clock() * 1000))

    def _make_requests(self, loop: asyncio.AbstractEventLoop) -> None:
        machine, clock = self._machine, self._clock
        config, shared, ledger = machine.config, machine.shared, machine.ledger
        self.registry = RequestRegistry(shared, config.index, config.wake_fds, loop.call_soon, clock)
        events = DeploymentEvents(machine.spool, clock)
        self.health = PassiveHealthChecker(self.active, shared, config.index, events, self.registry, clock)
        ttft_error = self.metrics.histogram("fleetgate_ttft_prediction_error_seconds", {})
        accounts = CapacityAccounts(shared, config.index, self._work_ledger, self.tracker, ttft_error)
        outcomes = OutcomeRecorder(
            self.metrics, self.access_log, self.decisions, self.journal, self._estimates, self._cache
        )
        placer = Placer(self.active, ledger, accounts, self.registry, self.health, self.decisions)
        attempts = AttemptServices(
            clock,
            self._tasks.spawn,
            transport.find(config.transport).make(self._network, self._tasks.spawn),
            self.active,
            ledger,
            self.registry,
        )
        poison = PoisonDetector(self.active, self._network, events, clock)
        effects = AttemptEffects(self.health, poison, accounts, outcomes)
        self.handler_services = HandlerServices(self._ids, self.defaults, placer, self.registry, attempts, effects)

    def _make_connections(self) -> None:
        machine, config = self._machine, self._machine.config
        needs_keys = config.auth == "keys"
        pepper = (self._data_dir / "pepper").read_bytes() if needs_keys else None
        self.validity = KeyValidity(self._data_dir, machine.shared, config.max_stale_s)
        self.overload = OverloadManager(config.connections_max)
        self.limits = self._connection_limits(needs_keys)
        self.idempotency = IdempotencyStore(self._data_dir, self.notices)
        policies = PolicyFilter(self._estimates, machine.spool, self.access_log, self._clock)
        self.connection_services = ConnectionServices(
            self.limits,
            RequestAuthorizer(self.active, Authenticator(pepper), self.validity, config.cors, needs_keys, self._clock),
            RequestIntake(policies, self.idempotency),
            LocalResponder(self.defaults, self._ids.__next__, self.metrics, self.access_log),
            partial(RequestHandler, self.handler_services),
            self.boundary.report,
        )

    def _connection_limits(self, needs_keys: bool) -> ConnectionLimits:
        config, overload = self._machine.config, self.overload
        workers = config.serving or config.workers
        budget_bytes = (config.body_budget_bytes or int(overload.memory_bytes * BODY_SHARE)) // workers
        if not config.body_budget_bytes:
            budget_bytes = max(budget_bytes, BODY_BUDGET_BYTES_MIN)
        key_max = config.key_connections_max
        if key_max < 0 or not needs_keys:
            key_max = overload.connections_max // 2 if needs_keys else 0
        bodies = BodyBudget(budget_bytes, self.notices)
        shared, ip_max = self._machine.shared, config.ip_connections_max
        return ConnectionLimits(shared, config.index, overload.connections_max, ip_max, key_max, bodies)

    def _make_upkeep(self) -> None:
        machine, clock = self._machine, self._clock
        config, shared = machine.config, machine.shared
        self.prober = HealthChecker(self.active, shared, self.health, self._network, machine.try_prober_lock, clock)
        self.resume_probe = ResumeProbe(
            self.active, shared, machine.ledger, self._network, self._is_prober, self.registry.slot_freed
        )
        activator = TableActivator(self.active, shared, config.index, self.tracker, self.health, self.registry)
        self.snapshots = WorkerSnapshots(
            machine.config,
            (machine.log, machine.spool),
            shared,
            self.validity,
            self._activate,
            clock,
        )
        self._activator = activator
        logs = (self.access_log, self.decisions.log) if self.decisions is not None else (self.access_log,)
        watched: dict[str, LineLog | Log] = {"access": self.access_log, "process": machine.log}
        if self.decisions is not None:
            watched["record"] = self.decisions.log
        parts = Ticked(
            active=self.active,
            activator=activator,
            registry=self.registry,
            health=self.health,
            tracker=self.tracker,
            limits=self.limits,
            overload=self.overload,
            notices=self.notices,
            journal=self.journal,
            defaults=self.defaults,
            logs=logs,
            dropped_lines=DroppedLines(self.metrics, watched),
        )
        outputs = (machine.spool, self.access_log)
        self.ticker = Ticker(parts, shared, config.index, outputs, self._is_prober, clock)
        self.drain = Drain(shared, config.index, self.limits, self.defaults, clock)

    def _is_prober(self) -> bool:
        return self.prober.is_prober

    def _activate(self, make: Callable[[RoutingTableBuilder, RoutingTable], RoutingTable]) -> None:
        """Make a table from a Snapshot, and use it."""
        self._activator.activate(make(self.builder, self.active.current), REVOKED, self._clock)

    def note_lag(self, lag_s: float, where: str) -> None:
        """Report a blocked event loop."""
        config, shared, lag_ms = self._machine.config, self._machine.shared, int(lag_s * 1000)
        self.metrics.cells[self._lags] += 1
        self.metrics.cells[self._lag_ms] += lag_ms
        shared.set(config.index, WorkerCell.LAG_MS, lag_ms)
        shared.set(config.index, WorkerCell.LAG_AT_MS, int(self._clock() * 1000))
        self.notices.emit("lag", f"the event loop was blocked for {lag_ms} ms: {where}")

    def close(self) -> None:
        """Write what is left of logs and journal."""
        self.access_log.close()
        self.journal.close()
        if self.decisions is not None:
            self.decisions.log.close()
            dropped = self.decisions.log.dropped
            if dropped:
                message = f"--record: the disk was too slow, {dropped} records were not written"
                self._machine.log.write(Level.WARNING, "worker", message)
        self._machine.log.drain()
