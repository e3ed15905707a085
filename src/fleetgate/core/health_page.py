"""The reference page of health, drawn from the table that decides it."""

from textwrap import wrap

from fleetgate.core.capacity.units import SLOW_START_MIN, SLOW_START_S
from fleetgate.core.health.circuit_breaker import (
    CONSECUTIVE_FAILURES_MAX,
    DENIED_FIRST_S,
    EJECTION_FIRST_S,
    EJECTION_MAX_S,
    FLAPPING_EJECTIONS,
    JITTER,
    STEADY_S,
    TRANSITIONS,
    BreakerState,
    Signal,
    Transition,
)
from fleetgate.core.health.outlier_detection import BROKEN_SHARE, REGION_SHARE, RESULTS_MIN, RESULTS_S, SLOW_FACTOR

STATES = {
    BreakerState.CLOSED: "gets requests; after a return by slow start",
    BreakerState.OPEN: "can be reached, but its answers break: gets none",
    BreakerState.DOWN: "cannot be reached: gets none",
    BreakerState.DENIED: "refuses the Deployment's credential: gets none; every Endpoint of the Deployment with it",
    BreakerState.HALF_OPEN: "gets one real request, and one more beside it for each that brought content",
}

SIGNALS = {
    Signal.WENT_WELL: "a request went well; of a stream, at its end",
    Signal.BROKE: "a request broke: reset, 5xx, too long silent, malformed or truncated answer",
    Signal.MOSTLY_BROKE: f"of at least {RESULTS_MIN} requests in {RESULTS_S:g} s more than {BROKEN_SHARE:.0%} broke",
    Signal.UNREACHABLE: "no connection: refused, no answer in time, no address, a certificate that does not verify",
    Signal.DENIED: "401 or 403 from its engine",
    Signal.SLOW: f"its first or next tokens take {SLOW_FACTOR:g} times as long as usual, and others can take its work",
    Signal.PROBE_WELL: "its probe was answered",
    Signal.PROBE_BROKE: "its probe was not answered, or with 5xx",
    Signal.REGION_LOST: f"others of its region, and at least {REGION_SHARE:.0%} of it, went out within two seconds",
    Signal.EVERYBODY_OUT: "nobody else who could take a request is in, and this one is the least bad; once a second",
    Signal.BACK_OFF_OVER: "its time out is over",
    Signal.NEW_CREDENTIAL: "a Snapshot brought another credential",
}


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([*_head(), *_states(), *_moves(), *_diagram(), *_rules()])


def _head() -> list[str]:
    return [
        "# Health",
        "",
        "One circuit breaker for each Endpoint, in each worker, fed by real requests and by probes alike. This page is",
        "drawn from the table in `core/health/circuit_breaker.py`; what is not listed changes nothing.",
        "Being full is not ill health.",
        "",
    ]


def _states() -> list[str]:
    return ["| state | |", "|---|---|", *(f"| {state} | {told} |" for state, told in STATES.items()), ""]


def _moves() -> list[str]:
    rows = [
        f"| {state} | {SIGNALS[sign]} | {_needed(move)} | {move.to} |"
        for (state, sign), move in sorted(TRANSITIONS.items(), key=lambda row: list(BreakerState).index(row[0][0]))
    ]
    return ["| from | sign | in a row | to |", "|---|---|---|---|", *rows, ""]


def _needed(move: Transition) -> str:
    if not move.verified:
        return "1, unless it flaps"
    return str(move.in_a_row) if move.in_a_row else "1 for each ejection, up to 3"


def _diagram() -> list[str]:
    arrows: dict[tuple[BreakerState, BreakerState], list[str]] = {}
    for (state, sign), move in TRANSITIONS.items():
        arrows.setdefault((state, move.to), []).append(sign.replace("_", " "))
    lines = [f"    {state} --> {to}: {', '.join(signs)}" for (state, to), signs in arrows.items()]
    return ["```mermaid", "stateDiagram-v2", "    [*] --> closed", *lines, "```", ""]


def _rules() -> list[str]:
    told = (
        f"""**Back-off.** Out for {EJECTION_FIRST_S:g} s, then twice as long each time, up to {EJECTION_MAX_S:g} s; a
        refused credential begins with {DENIED_FIRST_S:g} s. Each pause varies by {JITTER:.0%} either way, so that
        proxies do not come back together. Who has been in for {STEADY_S:g} s without going out begins anew. Who went
        out {FLAPPING_EJECTIONS} times before that flaps: its probes no longer shorten its pause.""",
        f"""**Counting.** {CONSECUTIVE_FAILURES_MAX} broken requests in a row take an Endpoint out, or
        {CONSECUTIVE_FAILURES_MAX} broken probes; a request that goes well resets both counts, a probe that goes well
        only that of the probes.""",
        f"""**Slow start.** Back in, it begins with {SLOW_START_MIN:.0%} of its weight and has all of it after
        {SLOW_START_S:g} s. Where another Deployment is wholly fit, its limit grows with it, so that strategies that go
        by rank keep to it too.""",
    )
    return [line for text in told for line in (*wrap(" ".join(text.split()), 120), "")]
