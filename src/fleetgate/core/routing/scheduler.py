"""The scheduler of one model route in one proxy: it chooses a Deployment and reserves capacity there, in one step.

The live proxy and the simulator run the same scheduler.
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
# The share of the TTFT target that a prediction may use. Predictions are off by a few hundredths, so a request that is
# predicted at the target itself is late half the time. An idle replica always fits: targets are 1.5 × its TTFT or more.
TTFT_MARGIN = 0.9


class ScheduleRequest(NamedTuple):
    """A request that needs a Deployment.

    Units: `waited_s` since its arrival.
    Shape: `allowed` are the Deployment slots that policies leave, None for all; `preferred` are the slots that policies
    put first, in order.
    """

    shape: RequestShape
    waited_s: float = 0.0
    priority: Priority = Priority.STANDARD
    allowed: frozenset[int] | None = None
    preferred: tuple[int, ...] = ()


class Placement(NamedTuple):
    """The Deployment that a request goes to, its reservation there and its predicted latency.

    Units: `target_s` is the TTFT target of the request.
    """

    candidate: Candidate
    reservation: WorkReservation
    prediction: LatencyPrediction | None
    target_s: float


class ConsideredDecision(NamedTuple):
    """A decision and all its inputs. Units: `target_s` is the TTFT target of the request."""

    candidates: Sequence[Candidate]
    load: Load
    turn: Turn
    target_s: float
    decision: Decision | Rejection


class Scheduler:
    """The state of a model route between requests: the strategy's memory and the queue.

    Shape: `last_decision` is the last decision, kept only while `records_decisions` is set.
    """

    __slots__ = ("gateway", "has_slo", "last_decision", "loads", "queue", "records_decisions", "route", "slo", "turn")

    def __init__(self, gateway: Gateway, model_route: ModelRoute) -> None:
        self.gateway = gateway
        self.route = model_route
        self.slo = gateway.slo or DEFAULT_SLO
        self.has_slo = gateway.slo is not None
        self.turn: Turn = NO_TURN
        self.queue = RequestQueue()
        self.loads = CandidateLoads(model_route.candidates)
        self.records_decisions = False
        self.last_decision: ConsideredDecision | None = None

    def place(
        self,
        request: ScheduleRequest,
        views: Mapping[int, DeploymentView],
        work_ledger: WorkLedger,
        now_s: float,
        tried: Collection[int] = (),
    ) -> Placement | Rejection:
        """Route the request and reserve its capacity, or say why no Deployment takes it.

        Cost: with Profiles 10 µs with one candidate, 22 µs with sixteen of which the first has room.
        """
        model_route, loads = self.route, self.loads
        loads.refresh(views, work_ledger, now_s)
        if request.allowed is None:
            idle_s = loads.idle_ttft_min_s(request.shape.prompt_tokens)
        else:
            allowed = tuple(c for c in model_route.candidates if c.slot in request.allowed)
            model_route = ModelRoute(allowed, model_route.strategy)
            idle_s = idle_ttft_min_s(request.shape, allowed, views)
        # Without a written SLO no request is refused for latency, so the time it waited does not count either.
        target_s = ttft_target_s(self.slo, request.shape.prompt_tokens, idle_s)
        ttft_left_s = TTFT_MARGIN * target_s - (request.waited_s if self.has_slo else 0.0)
        shape = request.shape._replace(ttft_left_s=ttft_left_s)
        load = loads.for_request(shape)
        if self.records_decisions:
            loads.predict_all()  # before the reservation changes the load
        decision = route(model_route, load, self.turn, tried)
        if self.records_decisions:
            self.last_decision = ConsideredDecision(model_route.candidates, load, self.turn, target_s, decision)
        if isinstance(decision, Rejection):
            return decision
        excluded = decision.excluded
        for candidate in preferred_first(decision.order, request.preferred):
            state, view = load[candidate.slot], views[candidate.slot]
            prediction = state.prediction
            if prediction is not None and prediction.late:
                excluded += ((candidate.name, late_reason(prediction)),)
                continue
            limit = limit_for_priority(request.priority, state.limit)
            reservation = self._reservation(shape, candidate, prediction, view, work_ledger)
            if work_ledger.reserve(reservation, limit and max(1, limit - view.external_in_flight), now_s):
                self.turn = decision.turn
                return Placement(candidate, reservation, prediction, target_s)
        return Rejection(RejectionReason.ALL_FULL, excluded)

    def queue_deadline_s(
        self, shape: RequestShape, arrived_s: float, views: Mapping[int, DeploymentView], timeout_s: float = 0.0
    ) -> float:
        """Until when a request may wait: by the queue's limit, the client's timeout and, with an SLO, its TTFT."""
        limits_s = [self.gateway.admission.queue_timeout_s]
        if timeout_s:
            limits_s.append(timeout_s)
        if self.has_slo:
            idle_s = idle_ttft_min_s(shape, self.route.candidates, views)
            limits_s.append(TTFT_MARGIN * ttft_target_s(self.slo, shape.prompt_tokens, idle_s) - idle_s)
        return arrived_s + min(limits_s)

    def _reservation(
        self,
        shape: RequestShape,
        candidate: Candidate,
        prediction: LatencyPrediction | None,
        view: DeploymentView,
        work_ledger: WorkLedger,
    ) -> WorkReservation:
        profile = view.current_profile
        if prediction is None or profile is None:
            slots = [endpoint.endpoint_slot for endpoint in view.endpoints]
            endpoint_slot = min(slots, key=work_ledger.sequences) if len(slots) > 1 else slots[0] if slots else 0
            return WorkReservation(candidate.slot, endpoint_slot, int(shape.prompt_tokens), 0, 1000)
        uncached = shape.uncached_at(prediction.endpoint_slot)
        units = cost_units(profile.profile, self.slo.tpot_s, uncached, shape.output_tokens)
        kv_tokens = int(shape.prompt_tokens + shape.output_tokens)
        return WorkReservation(
            candidate.slot, prediction.endpoint_slot, int(uncached), kv_tokens, int(units * 1000), profile.window_s
        )


def limit_for_priority(priority: int, limit: int) -> int:
    """The part of a limit that requests of a priority may use; 0 stays "no limit"."""
    return max(1, int(limit * SHEDDABLE_SHARE_MAX)) if limit and priority == Priority.SHEDDABLE else limit


def preferred_first(order: Sequence[Candidate], preferred: Sequence[int]) -> Sequence[Candidate]:
    """An order with the Deployments first that policies prefer. Shape: `preferred` are slots."""
    if not preferred:
        return order
    ranks = {slot: rank for rank, slot in enumerate(preferred)}
    return sorted(order, key=lambda candidate: ranks.get(candidate.slot, len(preferred)))
