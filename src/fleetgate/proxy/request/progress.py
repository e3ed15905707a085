"""How far an answer has come, looked at once a second. Most requests end before the first look."""

from fleetgate.proxy.request import deadlines
from fleetgate.proxy.request.attempt import Attempt
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.transport.interface import UpstreamResponse


class ProgressMonitor:
    """Watches one request's stream. Units: `first_s` is when the client got its first content, 0 before it."""

    __slots__ = ("_progress", "_read_s")

    def __init__(self) -> None:
        self._progress = 0  # at the last tick
        self._read_s = 0.0  # when the client last read something, as far as ticks tell

    def restart(self) -> None:
        """Another attempt begins."""
        self._progress = 0

    def observe_speed(
        self, attempt: Attempt, response: UpstreamResponse, times_s: tuple[float, float], body_bytes: int, first: bool
    ) -> None:
        """Record how long a first token took, and how far the stream came since the last tick.

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
        """Whether the answer has come further since the last call."""
        progress = progress_of(response)
        moved, self._progress = progress != self._progress, progress
        return moved

    def note_read(self, deployment: DeploymentState, first_s: float, now_s: float, is_behind: bool) -> None:
        """The client read something. A silence that ended by itself was no stall: longer ones are then allowed."""
        silent_s = now_s - max(first_s, self._read_s)
        if silent_s > deadlines.SILENCE_S and not is_behind:
            deployment.timing.record_gap(silent_s)
        self._read_s = now_s

    def is_comment_due(self, started_s: float, now_s: float) -> bool:
        """Whether the client has read nothing for so long that an intermediary may close its connection."""
        return now_s - (self._read_s or started_s) >= deadlines.COMMENT_EVERY_S

    def note_comment(self, now_s: float) -> None:
        """A comment was sent."""
        self._read_s = now_s


def progress_of(response: UpstreamResponse) -> int:
    """A number that rises with each sign of life of an answer."""
    return response.beats + response.event_count + response.body_bytes
