"""The slot of one request at a Deployment and its predicted token work, from placement to settlement."""

from fleetgate.core.admission.request_queue import PRIORITIES, Priority
from fleetgate.core.admission.work_ledger import WorkLedger, WorkReservation
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.routing.prefix_affinity import BLOCK_TOKENS, COLD
from fleetgate.core.routing.scheduler import Placement, ScheduleRequest
from fleetgate.ipc.shared_memory import TALLY_CELLS, DeploymentCounter, SharedMemory
from fleetgate.protocols.prompt_prefix import chain_of
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.telemetry.metrics import LatencyHistogram

# A response that is not streamed has no visible first token: its prompt counts as prefilled after this many times
# the predicted TTFT.
UNSEEN_FIRST_FACTOR = 1.5
ENDED, TTFT_LATE, TPOT_LATE, REFUSED = (
    int(DeploymentCounter.ENDED),
    int(DeploymentCounter.TTFT_LATE),
    int(DeploymentCounter.TPOT_LATE),
    int(DeploymentCounter.REFUSED),
)


class PlacementRequest:
    """What a request needs of a Deployment, computed once for all its searches."""

    __slots__ = ("_allowed", "_preferred", "prefix_chain", "priority", "shape")

    def __init__(self, received: ReceivedRequest, route: ModelRouteState, estimates: TokenEstimates) -> None:
        context, body, model = received.context, received.body, route.model
        # With a single Endpoint there is no choice, so the prefix is not needed.
        self.prefix_chain = chain_of(body, context.session, context.protocol.PROMPT_MARKS) if route.has_choice else ()
        warm = route.affinity.find(self.prefix_chain) if self.prefix_chain else COLD
        self.shape = RequestShape(
            prompt_tokens=estimates.prompt_tokens(model, len(body)),
            output_tokens=estimates.output_tokens(model, context.key.name, context.protocol.output_tokens_max(body)),
            warm_slot=warm.endpoint_slot,
            warm_tokens=warm.blocks * BLOCK_TOKENS,
        )
        decision = received.decision
        self.priority = PRIORITIES[decision.priority] if decision.priority else Priority.STANDARD
        self._allowed, self._preferred = decision.allowed, decision.preferred

    def schedule_request(self, waited_s: float) -> ScheduleRequest:
        """The request for the scheduler, at this moment."""
        return ScheduleRequest(self.shape, waited_s, self.priority, self._allowed, self._preferred)


class CapacityAccounts:
    """Where reservations of one worker are recorded: token work, learned speed, counters of late and ended requests."""

    __slots__ = ("_counters", "_worker", "_workers", "tracker", "ttft_error", "work_ledger")

    def __init__(
        self,
        shared: SharedMemory,
        worker: int,
        work_ledger: WorkLedger,
        tracker: CapacityTracker,
        ttft_error: LatencyHistogram,
    ) -> None:
        self._counters = shared.deployment_counters
        self._workers = shared.workers
        self._worker = worker
        self.work_ledger = work_ledger
        self.tracker = tracker
        self.ttft_error = ttft_error

    def count(self, slot: int, counter: int) -> None:
        """Count an event of a Deployment for the correction of its limit."""
        self._counters[(slot * self._workers + self._worker) * TALLY_CELLS + counter] += 1


class Reservation:
    """A reserved slot. Cost: 3 µs over its life.

    Shape: `endpoint_slot` is the Endpoint that was chosen; `predicted_ttft_s` is None without a Profile.
    """

    __slots__ = (
        "_accounts",
        "_first_s",
        "_has_slo",
        "_placement",
        "_seen_tokens",
        "_sent_s",
        "_work",
        "endpoint_slot",
        "predicted_ttft_s",
    )

    def __init__(self, accounts: CapacityAccounts, placement: Placement, has_slo: bool, now_s: float) -> None:
        self._accounts = accounts
        self._has_slo = has_slo  # without it no request counts as late
        self._placement = placement
        self._work: WorkReservation = placement.reservation
        self.endpoint_slot = placement.reservation.endpoint_slot
        self.predicted_ttft_s = placement.prediction.ttft_s if placement.prediction is not None else None
        self._sent_s = now_s
        self._first_s = 0.0
        self._seen_tokens = 0

    def move(self, endpoint_slot: int) -> None:
        """Move to another Endpoint of the Deployment: the chosen one became unhealthy."""
        if endpoint_slot != self.endpoint_slot:
            self.endpoint_slot = endpoint_slot
            self._work = self._accounts.work_ledger.move(self._work, endpoint_slot)

    def first_token(self, ttft_s: float, now_s: float) -> None:
        """Record the first token of a stream. Units: `ttft_s` counts from the request's arrival at the worker."""
        accounts = self._accounts
        self._first_s = now_s
        self._work = accounts.work_ledger.first_token(self._work, now_s)
        prediction, observed_s = self._placement.prediction, now_s - self._sent_s
        if prediction is not None:
            accounts.tracker.record_first_token(self._work.slot, prediction, observed_s)
            accounts.ttft_error.observe(abs(observed_s - prediction.ttft_s))
            if self._has_slo and ttft_s > self._placement.target_s:
                accounts.count(self._work.slot, TTFT_LATE)

    def resumed(self, now_s: float) -> None:
        """Count the prompt of a resumed response as prefilled; nothing is learned from it."""
        self._work = self._accounts.work_ledger.first_token(self._work, now_s)

    def tick(self, tokens: int, furthest: dict[int, int], now_s: float) -> None:
        """Record progress, once a second. Units: `tokens` of its stream so far, -1 before the first.

        The first token of a response that is not streamed is presumed when it is overdue.
        Shape: `furthest` collects, by Endpoint slot, the most tokens that one stream got since the last tick.
        """
        if tokens >= 0:
            if self._seen_tokens:
                slot = self._work.endpoint_slot
                furthest[slot] = max(furthest.get(slot, 0), tokens - self._seen_tokens)
            self._seen_tokens = tokens
            return
        prediction = self._placement.prediction
        overdue_s = UNSEEN_FIRST_FACTOR * prediction.ttft_s if prediction is not None else 0.0
        if prediction is not None and self._work.pending_tokens and now_s - self._sent_s > overdue_s:
            self._work = self._accounts.work_ledger.first_token(self._work, now_s)

    def ended(self, output_tokens: int, tpot_max_s: float, now_s: float) -> None:
        """Record a response that ended well. Units: `output_tokens` 0 if they are not known or were not streamed."""
        self._accounts.count(self._work.slot, ENDED)
        if not self._has_slo or output_tokens <= 1 or not self._first_s:
            return
        if (now_s - self._first_s) / (output_tokens - 1) > tpot_max_s:
            self._accounts.count(self._work.slot, TPOT_LATE)

    def measured(self, prompt_tokens: float, output_tokens: float, now_s: float) -> None:
        """Learn from the work done in the slot. With a Profile, speeds are learned from streams instead."""
        if self._placement.prediction is None:
            units = RequestShape(prompt_tokens, output_tokens).units
            self._accounts.tracker.record_end(self._work.slot, units, now_s - self._sent_s)

    def settle(self) -> None:
        """Release the slot and its token work."""
        self._accounts.work_ledger.settle(self._work)
