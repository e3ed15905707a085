"""Finds a slot for a request: at the route's lead, or where the scheduler decides; otherwise the request waits."""

from collections.abc import Collection
from typing import Protocol

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.exchange import NotPicked, QueueFull, QueueTimeout
from fleetgate.core.routing.route import RejectionReason
from fleetgate.core.routing.scheduler import Placement
from fleetgate.core.routing.strategies import Candidate
from fleetgate.proxy.request.outcome import identity_of
from fleetgate.proxy.request.registry import RegisteredRequest, RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import CapacityAccounts, PlacementRequest, Reservation
from fleetgate.proxy.request.resume import Resume
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.telemetry.decision_log import DecisionLog

RETRY_AFTER_IN_PLACE_MAX_S = 2.0  # faults.md row 16: with a longer one no request waits in the queue
QUEUE_FULL = QueueFull()
# Without a candidate left a request fails at once, unless an ejected Endpoint is due for a trial.
NO_CANDIDATE = (RejectionReason.NONE_UP, RejectionReason.ALL_TRIED)


class PanicPicker(Protocol):
    """Puts ejected Endpoints on trial when all are ejected."""

    def panic_pick(self, route: ModelRouteState, now_s: float, without: Collection[int] = ()) -> bool:
        """Put the least bad ejected Endpoint of this route on trial; False if none is due."""


class PlacementQuery(msgspec.Struct):
    """The inputs of one search for a slot.

    Shape: `tried` and `failed` are the Deployments (slots) and Endpoints that failed this request; `is_queued` is true
    if it already waits. Units: `wants_since_s` is when the search began.
    """

    request: PlacementRequest
    request_id: bytes
    received: ReceivedRequest
    route: ModelRouteState
    wants_since_s: float
    is_queued: bool = False
    tried: tuple[int, ...] = ()
    failed: tuple[EndpointState, ...] = ()
    resume: Resume | None = None


class PlacedRequest(msgspec.Struct):
    """A reserved slot. Shape: `reservation` is None if the route's lead took the request without a prediction."""

    candidate: Candidate
    deployment: DeploymentState
    reservation: Reservation | None


class Placer:
    """Finds slots for the requests of one worker."""

    def __init__(
        self,
        active: ActiveTable,
        ledger: Ledger,
        accounts: CapacityAccounts,
        registry: RequestRegistry,
        panic: PanicPicker,
        decisions: DecisionLog | None,
    ) -> None:
        self._active = active
        self._ledger = ledger
        self._accounts = accounts
        self._registry = registry
        self._panic = panic
        self._decisions = decisions

    def current_route(self, route: ModelRouteState) -> ModelRouteState:
        """The route of the active Snapshot that replaced an older one."""
        return self._active.current.successor(route)

    def take_lead(self, route: ModelRouteState) -> DeploymentState | None:
        """Reserve at the route's lead without a decision; None if there is no lead or it has no slot."""
        lead = route.lead
        if lead is None or route.queue.length:
            return None
        deployment = route.by_slot[lead.slot]
        if deployment.health < 1.0 or deployment.external_in_flight or deployment.paused:
            return None
        return deployment if self._ledger.reserve(lead.slot, deployment.limit) else None

    def place(self, query: PlacementQuery, now_s: float) -> PlacedRequest | NotPicked:
        """Reserve the slot that the scheduler chooses, or return why there is none."""
        route, request = query.route, query.request
        if not query.is_queued and not query.tried:
            first = route.queue.first()
            if first is not None and first.priority <= request.priority:
                return NotPicked(RejectionReason.ALL_FULL)  # requests wait already, and new ones queue behind them
        accounts, decisions = self._accounts, self._decisions
        while True:
            tried = self._exhausted(query.tried, query.failed, now_s) if query.tried else []
            if route.missing_models:
                tried = [*tried, *route.slots_without_model(query.received.context.path, now_s)]
            if query.resume is not None:
                tried = [*tried, *query.resume.unfit_slots(route)]
            asked = request.schedule_request(now_s - query.wants_since_s)
            placed = route.scheduler.place(asked, accounts.tracker.views, accounts.work_ledger, now_s, tried)
            considered = route.scheduler.last_decision
            if decisions is not None and considered is not None:
                identity = identity_of(decisions, query.request_id, query.received, route)
                decisions.decided(identity, considered, asked, tried, placed)
            if isinstance(placed, Placement):
                route.affinity.record(request.prefix_chain, placed.reservation.endpoint_slot)
                reservation = Reservation(accounts, placed, route.scheduler.has_slo, now_s)
                return PlacedRequest(placed.candidate, route.by_slot[placed.candidate.slot], reservation)
            reason = route.explain(placed.reason, tried, query.wants_since_s, now_s)
            if reason not in NO_CANDIDATE or not self._panic.panic_pick(route, now_s, query.tried):
                return NotPicked(reason)

    def place_beside(self, query: PlacementQuery, now_s: float) -> tuple[PlacedRequest, EndpointState] | None:
        """Reserve a slot at another Deployment for a second attempt beside the first; None if there is none."""
        route, accounts = query.route, self._accounts
        asked = query.request.schedule_request(0.0)  # the TTFT of the new attempt begins now
        placed = route.scheduler.place(asked, accounts.tracker.views, accounts.work_ledger, now_s, query.tried)
        if not isinstance(placed, Placement):
            return None
        deployment = route.by_slot[placed.candidate.slot]
        endpoint = deployment.endpoint_by_slot.get(placed.reservation.endpoint_slot)
        if endpoint is None or query.received.info.model not in deployment.upstream_names:
            accounts.work_ledger.settle(placed.reservation)
            return None
        reservation = Reservation(accounts, placed, route.scheduler.has_slo, now_s)
        return PlacedRequest(placed.candidate, deployment, reservation), endpoint

    def _exhausted(self, slots: tuple[int, ...], failed: tuple[EndpointState, ...], now_s: float) -> list[int]:
        """The tried Deployments without another Endpoint to try."""
        deployments = self._active.current.deployments
        return [
            slot for slot in slots if slot not in deployments or not deployments[slot].choose_endpoint(now_s, failed)
        ]

    def enqueue(
        self, query: PlacementQuery, waiter: RegisteredRequest, moved: bool, now_s: float
    ) -> QueueEntry | QueueTimeout | QueueFull:
        """Join the queue, unless it is full or the expected wait is too long.

        Shape: `moved` requests wait ahead of new ones.
        """
        route, request, context = query.route, query.request, query.received.context
        spec, registry, drain_rate = route.gateway.spec, self._registry, route.drain_rate
        retry_after_s = route.retry_after_s(now_s)
        if retry_after_s > RETRY_AFTER_IN_PLACE_MAX_S:  # no Deployment accepts requests before
            return QueueTimeout(retry_after_s)
        if registry.total_waiting(spec.slot) >= spec.admission.queue_max:
            shed = route.queue.shed_candidate(request.priority, context.key.name)
            if shed is None:
                return QUEUE_FULL
            registry.shed(shed)
        views, shape = self._accounts.tracker.views, request.shape
        deadline_s = route.scheduler.queue_deadline_s(shape, query.wants_since_s, views, context.timeout_s)
        if spec.slo is not None or context.timeout_s:  # the Gateway or the client set a deadline
            expected_s = now_s + drain_rate.wait_expected_s(len(route.queue) + 1)
            if expected_s > deadline_s:
                return QueueTimeout(drain_rate.retry_after_s(len(route.queue) + 1))
        entry = QueueEntry(deadline_s, context.key.name, shape.units, request.priority)
        registry.join(entry, waiter, moved)
        return entry


class SlotSearch(msgspec.Struct, eq=False):
    """The search for a slot when the route's lead cannot take the request. A Struct, so that making one costs no call.

    Shape: `entry` is its place in the queue, None outside it.
    """

    placer: Placer
    registry: RequestRegistry
    id: bytes
    received: ReceivedRequest
    started_s: float
    request: PlacementRequest
    entry: QueueEntry | None = None

    def place(
        self,
        route: ModelRouteState,
        tried: tuple[int, ...],
        failed: tuple[EndpointState, ...],
        resume: Resume | None,
        now_s: float,
    ) -> PlacedRequest | NotPicked:
        """Reserve a slot. Shape: `tried` and `failed` are Deployments (slots) and Endpoints that failed the request."""
        wants_since_s = self.started_s if resume is None else resume.lost_s
        is_queued = self.entry is not None
        query = PlacementQuery(
            self.request, self.id, self.received, route, wants_since_s, is_queued, tried, failed, resume
        )
        return self.placer.place(query, now_s)

    def place_beside(
        self, route: ModelRouteState, tried: tuple[int, ...], now_s: float
    ) -> tuple[PlacedRequest, EndpointState] | None:
        """Reserve a slot elsewhere for a second attempt."""
        query = PlacementQuery(self.request, self.id, self.received, route, self.started_s, tried=tried)
        return self.placer.place_beside(query, now_s)

    def enqueue(
        self, waiter: RegisteredRequest, resume: Resume | None, moved: bool, now_s: float
    ) -> QueueTimeout | QueueFull | None:
        """Wait in the queue. Returns the refusal if that is not possible."""
        wants_since_s = self.started_s if resume is None else resume.lost_s
        query = PlacementQuery(self.request, self.id, self.received, waiter.route, wants_since_s, resume=resume)
        entered = self.placer.enqueue(query, waiter, moved, now_s)
        if not isinstance(entered, QueueEntry):
            return entered
        self.entry = entered
        return None

    def leave_queue(self, waiter: RegisteredRequest, served: bool) -> None:
        """Leave the queue."""
        entry, self.entry = self.entry, None
        if entry is not None:
            self.registry.leave(entry, waiter, served)
