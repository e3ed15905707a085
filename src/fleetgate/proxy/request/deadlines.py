"""How long an attempt, and a silence inside its answer, may last. Functions of values."""

from fleetgate.core.health import timeouts
from fleetgate.proxy.routing.deployment_state import DeploymentState

WHOLE_ANSWER_MAX_S = timeouts.WHOLE_MAX_S
SILENCE_S = 1.5  # between two ticks that are a second apart: more than chance
COMMENT_EVERY_S = 10.0  # faults.md row 6


def first_event_s(stream: bool, body_bytes: int, deployment: DeploymentState, predicted_s: float | None) -> float:
    """How long an attempt may take to its first event. An unstreamed answer may get more time: `whole_answer_s`.

    What was seen stands beside what is predicted: the longer one counts.
    """
    if not stream:
        return min(WHOLE_ANSWER_MAX_S, timeouts.WHOLE_MIN_S)
    seen_s = deployment.timing.first_tokens.expected_s(body_bytes)
    if seen_s is not None:
        predicted_s = max(predicted_s or 0.0, seen_s)
    return timeouts.first_event_s(predicted_s)


def whole_answer_s(deployment: DeploymentState, predicted_s: float | None, output_tokens_max: int) -> float:
    """How long an answer that is not streamed may take in all."""
    token_s = deployment.timing.token_s
    return min(WHOLE_ANSWER_MAX_S, timeouts.whole_answer_s(predicted_s, token_s, output_tokens_max))


def stall_s(deployment: DeploymentState | None) -> float:
    """How long an answer that has begun may be silent."""
    return deployment.timing.stall_s if deployment is not None else timeouts.STALL_MAX_S
