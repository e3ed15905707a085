"""The reference page of health, generated from the table that decides it."""

from textwrap import wrap

from fleetgate.core.capacity.units import SLOW_START_MIN, SLOW_START_S
from fleetgate.core.health.circuit_breaker import (
    CONSECUTIVE_FAILURES_MAX,
    DENIED_FIRST_S,
    EJECTION_FIRST_S,
    EJECTION_MAX_S,
    FLAPPING_EJECTIONS,
    JITTER,
    RECOVERY_SUCCESSES_MAX,
    STEADY_S,
    TRANSITIONS,
    BreakerState,
    Signal,
    Transition,
)
from fleetgate.core.health.outlier_detection import (
    BROKEN_SHARE,
    REGION_S,
    REGION_SHARE,
    RESULTS_MIN,
    RESULTS_S,
    SLOW_FACTOR,
)

STATES = {
    BreakerState.CLOSED: "gets requests; after a return by slow start",
    BreakerState.OPEN: "can be reached, but its responses break: gets no requests",
    BreakerState.DOWN: "cannot be reached: gets no requests",
    BreakerState.DENIED: "refuses the Deployment's credential: all Endpoints of the Deployment get no requests",
    BreakerState.HALF_OPEN: "gets one client request, and one more at a time for each that brought content",
}

SIGNALS = {
    Signal.WENT_WELL: "a request succeeded; a stream at its end",
    Signal.BROKE: "a request broke: reset, 5xx, silence past the timeout, malformed or truncated response",
    Signal.MOSTLY_BROKE: f"more than {BROKEN_SHARE:.0%} of at least {RESULTS_MIN} requests in {RESULTS_S:g} s broke",
    Signal.UNREACHABLE: "no connection: refused, connect timeout, no address, certificate not verified",
    Signal.DENIED: "the engine answered 401 or 403",
    Signal.SLOW: f"first or next tokens take {SLOW_FACTOR:g} times as long as usual, and others can take its load",
    Signal.PROBE_WELL: "a probe succeeded",
    Signal.PROBE_BROKE: "a probe got no response, or 5xx",
    Signal.REGION_LOST: f"at least {REGION_SHARE:.0%} of its region, but not it, were ejected within {REGION_S:g} s",
    Signal.ALL_EJECTED: "all candidates are ejected, and this one is the least bad; at most once a second",
    Signal.BACK_OFF_OVER: "its back-off is over",
    Signal.NEW_CREDENTIAL: "a Snapshot brought another credential",
}


def page() -> str:
    """The whole page, as Markdown."""
    return "\n".join([*_head(), *_states(), *_transitions(), *_diagram(), *_rules()])


def _head() -> list[str]:
    return [
        "# Health",
        "",
        "Each worker keeps one circuit breaker for each Endpoint. Client requests and probes feed it. This page is",
        "generated from the table in `core/health/circuit_breaker.py`; what is not listed changes nothing.",
        "A full Endpoint is not unhealthy.",
        "",
    ]


def _states() -> list[str]:
    rows = (f"| {state} | {meaning} |" for state, meaning in STATES.items())
    return ["| state | meaning |", "|---|---|", *rows, ""]


def _transitions() -> list[str]:
    rows = [
        f"| {state} | {SIGNALS[signal]} | {_needed(transition)} | {transition.to} |"
        for (state, signal), transition in sorted(
            TRANSITIONS.items(), key=lambda row: list(BreakerState).index(row[0][0])
        )
    ]
    return ["| from | signal | in a row | to |", "|---|---|---|---|", *rows, ""]


def _needed(transition: Transition) -> str:
    if not transition.verified:
        return "1, unless it flaps"
    return str(transition.in_a_row) if transition.in_a_row else f"1 for each ejection, up to {RECOVERY_SUCCESSES_MAX}"


def _diagram() -> list[str]:
    arrows: dict[tuple[BreakerState, BreakerState], list[str]] = {}
    for (state, signal), transition in TRANSITIONS.items():
        arrows.setdefault((state, transition.to), []).append(signal.replace("_", " "))
    lines = [f"    {state} --> {to}: {', '.join(signals)}" for (state, to), signals in arrows.items()]
    return ["```mermaid", "stateDiagram-v2", "    [*] --> closed", *lines, "```", ""]


def _rules() -> list[str]:
    texts = (
        f"""**Back-off.** The first ejection lasts {EJECTION_FIRST_S:g} s, each further one twice as long, up to
        {EJECTION_MAX_S:g} s; for a refused credential the first lasts {DENIED_FIRST_S:g} s. Each back-off varies by
        {JITTER:.0%} either way, so that proxies do not return together. An Endpoint that stays closed for
        {STEADY_S:g} s starts again at the first. An Endpoint with {FLAPPING_EJECTIONS} ejections since then flaps: a
        successful probe no longer shortens its back-off.""",
        f"""**Counting.** {CONSECUTIVE_FAILURES_MAX} broken requests in a row, or {CONSECUTIVE_FAILURES_MAX} broken
        probes in a row, eject an Endpoint. A successful request resets both counts, a successful probe only that of
        the probes.""",
        f"""**Slow start.** An Endpoint that returns starts with {SLOW_START_MIN:.0%} of its weight and has all of it
        after {SLOW_START_S:g} s. If another Deployment is fully healthy, its limit grows in the same way, so that
        strategies that go by rank respect it too.""",
    )
    return [line for text in texts for line in (*wrap(" ".join(text.split()), 120), "")]
