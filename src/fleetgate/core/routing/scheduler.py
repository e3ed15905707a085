"""One Lane in one proxy: find a request a place and reserve it, in one step.

The live proxy and the simulator both ask here, so what one shows the other does.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from fleetgate.core.admission.request_queue import SHEDDABLE_SHARE_MAX, Priority, RequestQueue
from fleetgate.core.admission.work_ledger import WorkLedger, WorkReservation
from fleetgate.core.capacity.deployment_view import DeploymentView
from fleetgate.core.capacity.latency_model import LatencyPrediction, RequestShape
from fleetgate.core.capacity.units import cost_units, ttft_target_s
from fleetgate.core.model import Gateway, Slo
from fleetgate.core.routing.load_view import CandidateLoads, idle_ttft_min_s
from fleetgate.core.routing.route import Decision, ModelRoute, Rejection, RejectionReason, late_reason, route
from fleetgate.core.routing.strategies import NO_TURN, Candidate, Load, Turn

DEFAULT_SLO = Slo()
# Of its target that a forecast may use up: forecasts are off by a few hundredths, and one at the edge is late half the
# time. Never less than an idle replica takes, because targets are at least 1.5 × that.
TTFT_MARGIN = 0.9


class ScheduleRequest(NamedTuple):
    """A request as it asks for a place.

    Units: `waited_s` since it came.
    Shape: `allowed` are the slots that policies leave, None for all; `preferred` those they want first, in order.
    """

    shape: RequestShape
    waited_s: float = 0.0
    priority: Priority = Priority.STANDARD
    allowed: frozenset[int] | None = None
    preferred: tuple[int, ...] = ()


class Placement(NamedTuple):
    """A place was found and reserved: at whom, what is held, and how the request should do there.

    Units: `target_s` is the TTFT it was promised.
    """

    candidate: Candidate
    reservation: WorkReservation
    prediction: LatencyPrediction | None
    target_s: float


class ConsideredDecision(NamedTuple):
    """Everything that a decision was taken from, and the decision. Units: `target_s` is the TTFT that was promised."""

    candidates: Sequence[Candidate]
    load: Load
    turn: Turn
    target_s: float
    decision: Decision | Rejection


class Scheduler:
    """What a Lane remembers from request to request: whose turn it is, and who waits.

    Shape: `last_decision` is the last decision, kept only while `keeps_considered`, for whoever records it.
    """

    __slots__ = ("gateway", "has_slo", "last_decision", "loads", "queue", "records_decisions", "route", "slo", "turn")

    def __init__(self, gateway: Gateway, lane: ModelRoute) -> None:
        self.gateway = gateway
        self.route = lane
        self.slo = gateway.slo or DEFAULT_SLO
        self.has_slo = gateway.slo is not None
        self.turn: Turn = NO_TURN
        self.queue = RequestQueue()
        self.loads = CandidateLoads(lane.candidates)
        self.records_decisions = False
        self.last_decision: ConsideredDecision | None = None

    def place(
        self,
        wish: ScheduleRequest,
        outlooks: Mapping[int, DeploymentView],
        books: WorkLedger,
        now_s: float,
        tried: Collection[int] = (),
    ) -> Placement | Rejection:
        """Route the request and reserve its place, or say why there is none.

        Cost: with Profiles 10 µs with one candidate, 22 µs with sixteen of which the first has room.
        """
        lane, scene = self.route, self.loads
        scene.refresh(outlooks, books, now_s)
        if wish.allowed is None:
            idle_s = scene.idle_ttft_min_s(wish.shape.prompt_tokens)
        else:
            lane = ModelRoute(tuple(c for c in lane.candidates if c.slot in wish.allowed), lane.strategy)
            idle_s = idle_ttft_min_s(wish.shape, lane.candidates, outlooks)
        # Without a written SLO nothing is refused by it: what a request has waited takes nothing from its target.
        promised_s = ttft_target_s(self.slo, wish.shape.prompt_tokens, idle_s)
        need = wish.shape._replace(ttft_left_s=TTFT_MARGIN * promised_s - (wish.waited_s if self.has_slo else 0.0))
        load = scene.for_request(need)
        if self.records_decisions:
            scene.predict_all()  # while nothing is reserved yet
        decision = route(lane, load, self.turn, tried)
        if self.records_decisions:
            self.last_decision = ConsideredDecision(lane.candidates, load, self.turn, promised_s, decision)
        if isinstance(decision, Rejection):
            return decision
        excluded = decision.excluded
        for candidate in preferred_first(decision.order, wish.preferred):
            standing, outlook = load[candidate.slot], outlooks[candidate.slot]
            fit = standing.fit
            if fit is not None and fit.late:
                excluded += ((candidate.name, late_reason(fit)),)
                continue
            limit = limit_for_priority(wish.priority, standing.limit)
            hold = self._hold(need, candidate, fit, outlook, books)
            if books.reserve(hold, limit and max(1, limit - outlook.external_in_flight), now_s):
                self.turn = decision.turn
                return Placement(candidate, hold, fit, promised_s)
        return Rejection(RejectionReason.ALL_FULL, excluded)

    def queue_deadline_s(
        self, need: RequestShape, came_s: float, outlooks: Mapping[int, DeploymentView], timeout_s: float = 0.0
    ) -> float:
        """How long it may wait: the queue's limit, the client's own, and, with an SLO, while its TTFT can be kept."""
        limits_s = [self.gateway.admission.queue_timeout_s]
        if timeout_s:
            limits_s.append(timeout_s)
        if self.has_slo:
            idle_s = idle_ttft_min_s(need, self.route.candidates, outlooks)
            limits_s.append(TTFT_MARGIN * ttft_target_s(self.slo, need.prompt_tokens, idle_s) - idle_s)
        return came_s + min(limits_s)

    def _hold(
        self,
        need: RequestShape,
        candidate: Candidate,
        fit: LatencyPrediction | None,
        outlook: DeploymentView,
        books: WorkLedger,
    ) -> WorkReservation:
        speed = outlook.current_profile
        if fit is None or speed is None:
            seats = outlook.endpoints
            at = 0 if len(seats) <= 1 else min(range(len(seats)), key=lambda n: books.sequences(seats[n].endpoint_slot))
            return WorkReservation(
                candidate.slot, seats[at].endpoint_slot if seats else 0, int(need.prompt_tokens), 0, 1000
            )
        uncached = need.uncached_at(fit.endpoint_slot)
        units = cost_units(speed.profile, self.slo.tpot_s, uncached, need.output_tokens)
        kv_tokens = int(need.prompt_tokens + need.output_tokens)
        return WorkReservation(
            candidate.slot, fit.endpoint_slot, int(uncached), kv_tokens, int(units * 1000), speed.window_s
        )


def limit_for_priority(priority: int, limit: int) -> int:
    """How much of a limit requests of a priority may take; 0 stays no limit."""
    return max(1, int(limit * SHEDDABLE_SHARE_MAX)) if limit and priority == Priority.SHEDDABLE else limit


def preferred_first(order: Sequence[Candidate], preferred: Sequence[int]) -> Sequence[Candidate]:
    """An order with those in front that policies want first. Shape: `preferred` are slots."""
    if not preferred:
        return order
    turns = {slot: turn for turn, slot in enumerate(preferred)}
    return sorted(order, key=lambda candidate: turns.get(candidate.slot, len(preferred)))
