"""Timeouts of attempts and of silence in a response, the progress of streams, and the moment of a hedge."""

from fleetgate.core.health import timeouts
from fleetgate.core.health.hedge_policy import has_spare_capacity, may_hedge
from fleetgate.proxy.request.attempt import Attempt
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import CapacityAccounts, PlacementRequest
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.transport.interface import UpstreamResponse

WHOLE_ANSWER_MAX_S = timeouts.WHOLE_MAX_S
SILENCE_S = 1.5  # more than the second between two ticks, so a real silence
COMMENT_EVERY_S = 10.0  # faults.md row 6


def first_event_s(stream: bool, body_bytes: int, deployment: DeploymentState, predicted_s: float | None) -> float:
    """The first-event timeout of an attempt. A response that is not streamed may get more time: `whole_answer_s`.

    What was seen stands beside what is predicted: the longer one counts.
    """
    if not stream:
        return min(WHOLE_ANSWER_MAX_S, timeouts.WHOLE_MIN_S)
    seen_s = deployment.timing.first_tokens.expected_s(body_bytes)
    if seen_s is not None:
        predicted_s = max(predicted_s or 0.0, seen_s)
    return timeouts.first_event_s(predicted_s)


def whole_answer_s(deployment: DeploymentState, predicted_s: float | None, output_tokens_max: int) -> float:
    """The timeout of a whole response that is not streamed."""
    token_s = deployment.timing.token_s
    return min(WHOLE_ANSWER_MAX_S, timeouts.whole_answer_s(predicted_s, token_s, output_tokens_max))


def stall_s(deployment: DeploymentState | None) -> float:
    """The stall timeout: the longest silence within a response."""
    return deployment.timing.stall_s if deployment is not None else timeouts.STALL_MAX_S


class ProgressMonitor:
    """Tracks the stream of one request. Units: `first_s` is when the client got its first content, 0 before it."""

    __slots__ = ("_progress", "_read_s")

    def __init__(self) -> None:
        self._progress = 0  # at the last tick
        self._read_s = 0.0  # when the client last read something, to the precision of a tick

    def restart(self) -> None:
        """Start again for another attempt."""
        self._progress = 0

    def observe_speed(
        self, attempt: Attempt, response: UpstreamResponse, times_s: tuple[float, float], body_bytes: int, first: bool
    ) -> None:
        """Record the time to the first token, and the progress of the stream since the last tick.

        Shape: `times_s` are `first_s` and now; `first` marks a request's first attempt.
        """
        endpoint, first_tokens = attempt.endpoint, attempt.deployment.timing.first_tokens
        (first_s, now_s), progress = times_s, progress_of(response)
        if endpoint is None:
            return
        if not first_s:
            if first:
                first_tokens.record_waiting(body_bytes, now_s - attempt.sent_s, now_s)
        elif not self._progress:
            ttft_s = first_s - attempt.sent_s
            first_tokens.record(body_bytes, ttft_s, now_s)
            endpoint.record_ttft(body_bytes, ttft_s)
            endpoint.record_pace(now_s - first_s, progress)
        else:
            endpoint.record_pace(1.0, progress - self._progress)

    def has_moved(self, response: UpstreamResponse) -> bool:
        """Whether the response made progress since the last call."""
        progress = progress_of(response)
        moved, self._progress = progress != self._progress, progress
        return moved

    def note_read(self, deployment: DeploymentState, first_s: float, now_s: float, is_behind: bool) -> None:
        """Note that the client read something. A silence that ended by itself was no stall and raises the timeout."""
        silent_s = now_s - max(first_s, self._read_s)
        if silent_s > SILENCE_S and not is_behind:
            deployment.timing.record_gap(silent_s)
        self._read_s = now_s

    def is_comment_due(self, started_s: float, now_s: float) -> bool:
        """Whether the client has received nothing for so long that an intermediary may close the connection."""
        return now_s - (self._read_s or started_s) >= COMMENT_EVERY_S

    def note_comment(self, now_s: float) -> None:
        """Note that a comment was sent."""
        self._read_s = now_s


def progress_of(response: UpstreamResponse) -> int:
    """A number that rises with each read of a response."""
    return response.beats + response.event_count + response.body_bytes


def is_hedge_due(
    received: ReceivedRequest,
    route: ModelRouteState,
    request: PlacementRequest | None,
    accounts: CapacityAccounts,
    started_s: float,
    now_s: float,
) -> bool:
    """Whether to hedge: the first attempt is slow, the priority permits it, and capacity and budget are left."""
    if request is None or not may_hedge(route.gateway.spec.resilience.hedge, request.priority):
        return False
    if now_s - started_s < route.hedge_threshold.threshold_s(request.shape.prompt_tokens):
        return False
    loads = route.scheduler.loads
    loads.refresh(accounts.tracker.views, accounts.work_ledger, now_s)
    return has_spare_capacity(loads.load.values()) and received.context.budget.take(now_s)
