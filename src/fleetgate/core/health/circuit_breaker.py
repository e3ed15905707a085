"""The circuit breaker of an Endpoint, fed by client requests and by probes alike.

`TRANSITIONS` is the complete table; a pair that is not listed changes nothing. docs/reference/health.md is generated
from it. A refusal because of load ("full") is not a signal here: it moves load and lowers limits, but it never opens a
breaker.
"""

from enum import StrEnum
from typing import NamedTuple

import msgspec

from fleetgate.core.health.outlier_detection import NO_RESULTS, ResultCounts

CONSECUTIVE_FAILURES_MAX = 3  # one reset is chance, three in a row are a fault
EJECTION_FIRST_S = 2.0
DENIED_FIRST_S = 30.0  # an operator has to renew the credential
EJECTION_MAX_S = 60.0  # a region that is back must not wait longer than a person would
JITTER = 0.2  # proxies that ejected an Endpoint together do not return to it together
STEADY_S = 60.0  # closed for so long, and earlier ejections are forgotten
FLAPPING_EJECTIONS = 3  # so many without being steady in between, and the result of its probes no longer counts
RECOVERY_SUCCESSES_MAX = 3  # an Endpoint closes after one success for each of its ejections, up to this many


class BreakerState(StrEnum):
    """The five states. Only `closed` and `half_open` get requests, the latter few at a time."""

    CLOSED = "closed"
    OPEN = "open"  # it can be reached, but its responses break
    DOWN = "down"  # it cannot be reached
    DENIED = "denied"  # it refuses our credential
    HALF_OPEN = "half_open"


class Signal(StrEnum):
    """What was observed of an Endpoint."""

    WENT_WELL = "went_well"
    BROKE = "broke"
    MOSTLY_BROKE = "mostly_broke"  # derived here from the results, never reported by a caller
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    SLOW = "slow"
    PROBE_WELL = "probe_well"
    PROBE_BROKE = "probe_broke"
    REGION_LOST = "region_lost"  # other Endpoints of its region were ejected within a short time
    ALL_EJECTED = "everybody_out"  # no Endpoint gets requests, and this one is the least bad
    BACK_OFF_OVER = "back_off_over"  # from the clock
    NEW_CREDENTIAL = "new_credential"


class Transition(NamedTuple):
    """Where a signal leads.

    Shape: `in_a_row` is how many such signals in a row it takes; 0 means one for each ejection, up to three. `verified`
    signals also count for a flapping Endpoint.
    """

    to: BreakerState
    in_a_row: int = 1
    verified: bool = True


_CLOSED, _OPEN, _DOWN, _DENIED, _HALF_OPEN = BreakerState
EJECTED_STATES = (_OPEN, _DOWN, _DENIED)

TRANSITIONS: dict[tuple[BreakerState, Signal], Transition] = {
    (_CLOSED, Signal.BROKE): Transition(_OPEN, in_a_row=CONSECUTIVE_FAILURES_MAX),
    (_CLOSED, Signal.MOSTLY_BROKE): Transition(_OPEN),
    (_CLOSED, Signal.SLOW): Transition(_OPEN),
    (_CLOSED, Signal.UNREACHABLE): Transition(_DOWN, in_a_row=CONSECUTIVE_FAILURES_MAX),
    (_CLOSED, Signal.PROBE_BROKE): Transition(_DOWN, in_a_row=CONSECUTIVE_FAILURES_MAX),
    (_CLOSED, Signal.DENIED): Transition(_DENIED),
    (_CLOSED, Signal.REGION_LOST): Transition(_HALF_OPEN),
    (_OPEN, Signal.BACK_OFF_OVER): Transition(_HALF_OPEN),
    (_OPEN, Signal.ALL_EJECTED): Transition(_HALF_OPEN),
    # A good probe proves the port, not the engine: it ends only an ejection by a probe or a failed connection.
    (_OPEN, Signal.PROBE_BROKE): Transition(_DOWN),
    (_OPEN, Signal.DENIED): Transition(_DENIED),
    (_DOWN, Signal.BACK_OFF_OVER): Transition(_HALF_OPEN),
    (_DOWN, Signal.ALL_EJECTED): Transition(_HALF_OPEN),
    (_DOWN, Signal.PROBE_WELL): Transition(_HALF_OPEN, verified=False),
    (_DOWN, Signal.DENIED): Transition(_DENIED),
    (_DENIED, Signal.BACK_OFF_OVER): Transition(_HALF_OPEN),
    (_DENIED, Signal.NEW_CREDENTIAL): Transition(_HALF_OPEN),
    (_HALF_OPEN, Signal.WENT_WELL): Transition(_CLOSED, in_a_row=0),
    (_HALF_OPEN, Signal.BROKE): Transition(_OPEN),
    (_HALF_OPEN, Signal.SLOW): Transition(_OPEN),
    (_HALF_OPEN, Signal.UNREACHABLE): Transition(_DOWN),
    (_HALF_OPEN, Signal.PROBE_BROKE): Transition(_DOWN),
    (_HALF_OPEN, Signal.DENIED): Transition(_DENIED),
}


class EndpointHealth(msgspec.Struct, frozen=True):
    """The health of one Endpoint.

    Units: seconds of the caller's clock.
    Shape: `ejections` since it was last steady; `recoveries` counts failed attempts to return from the last ejection.
    Probes are counted apart from requests, because the port may answer while requests break.
    """

    breaker: BreakerState = BreakerState.CLOSED
    consecutive_failures: int = 0
    consecutive_probe_failures: int = 0
    consecutive_successes: int = 0
    ejections: int = 0
    recoveries: int = 0
    open_until_s: float = 0.0
    recovered_at_s: float = float("-inf")
    results: ResultCounts = NO_RESULTS


HEALTHY = EndpointHealth()


def next_health(health: EndpointHealth, signal: Signal, now_s: float, entropy: float = 0.5) -> EndpointHealth:
    """The health after a signal; the same object if nothing changed. Shape: `entropy` is 0 to 1."""
    if health.breaker in EJECTED_STATES and now_s >= health.open_until_s:
        health = _enter(health, TRANSITIONS[health.breaker, Signal.BACK_OFF_OVER].to, now_s, entropy)
    health = _counted(health, signal, now_s)
    transition = TRANSITIONS.get((health.breaker, signal))
    if health.breaker is _CLOSED and health.results.mostly_broke and signal in (Signal.BROKE, Signal.UNREACHABLE):
        transition = TRANSITIONS[_CLOSED, Signal.MOSTLY_BROKE]
    if transition is None or (health.ejections >= FLAPPING_EJECTIONS and not transition.verified):
        return health
    needed = transition.in_a_row or min(RECOVERY_SUCCESSES_MAX, max(1, health.ejections))
    if needed == 1 or _in_a_row(health, signal) >= needed:
        return _enter(health, transition.to, now_s, entropy)
    return health


def current_state(health: EndpointHealth, now_s: float) -> BreakerState:
    """The state now: an ejected Endpoint is half open once its back-off is over."""
    if health.breaker in EJECTED_STATES and now_s >= health.open_until_s:
        return BreakerState.HALF_OPEN
    return health.breaker


def _in_a_row(health: EndpointHealth, signal: Signal) -> int:
    if signal is Signal.WENT_WELL:
        return health.consecutive_successes
    return health.consecutive_probe_failures if signal is Signal.PROBE_BROKE else health.consecutive_failures


def _counted(health: EndpointHealth, signal: Signal, now_s: float) -> EndpointHealth:
    """The health with the signal counted, in the same state."""
    replace = msgspec.structs.replace
    match health.breaker, signal:
        case BreakerState.CLOSED, Signal.WENT_WELL:
            return _after_success(health, now_s)
        case BreakerState.CLOSED, Signal.BROKE | Signal.UNREACHABLE:
            results = health.results.plus(now_s, broken=True)
            return replace(health, consecutive_failures=health.consecutive_failures + 1, results=results)
        case BreakerState.CLOSED, Signal.PROBE_BROKE:
            return replace(health, consecutive_probe_failures=health.consecutive_probe_failures + 1)
        case BreakerState.CLOSED, Signal.PROBE_WELL:
            return replace(health, consecutive_probe_failures=0) if health.consecutive_probe_failures else health
        case BreakerState.HALF_OPEN, Signal.WENT_WELL:
            return replace(health, consecutive_successes=health.consecutive_successes + 1)
        case _:
            return health


def _after_success(health: EndpointHealth, now_s: float) -> EndpointHealth:
    """The health of a closed Endpoint after a successful request, which proves more than any probe."""
    if health.results.is_over(now_s):
        if now_s - health.recovered_at_s > STEADY_S:
            return HEALTHY
        if health.results is NO_RESULTS and not health.consecutive_failures and not health.consecutive_probe_failures:
            return health
        return EndpointHealth(ejections=health.ejections, recovered_at_s=health.recovered_at_s)
    results = health.results.plus(now_s, broken=False)
    return msgspec.structs.replace(health, consecutive_failures=0, consecutive_probe_failures=0, results=results)


def _enter(health: EndpointHealth, to: BreakerState, now_s: float, entropy: float) -> EndpointHealth:
    if to is BreakerState.CLOSED:
        return EndpointHealth(ejections=health.ejections, recovered_at_s=now_s)
    ejections, recoveries, until_s = health.ejections, health.recoveries, health.open_until_s
    recovered_s = health.recovered_at_s
    if to is BreakerState.HALF_OPEN:
        return EndpointHealth(
            to, ejections=ejections, recoveries=recoveries, open_until_s=now_s, recovered_at_s=recovered_s
        )
    if health.breaker is BreakerState.HALF_OPEN and ejections:
        recoveries += 1
    elif health.breaker in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
        ejections, recoveries = (1 if now_s - recovered_s > STEADY_S else ejections + 1), 0
    if health.breaker not in EJECTED_STATES or to is BreakerState.DENIED:
        first_s = DENIED_FIRST_S if to is BreakerState.DENIED else EJECTION_FIRST_S
        until_s = now_s + ejection_s(first_s, ejections + recoveries)
        until_s += (until_s - now_s) * JITTER * (2.0 * entropy - 1.0)
        until_s = min(until_s, now_s + EJECTION_MAX_S)
    return EndpointHealth(
        to, ejections=ejections, recoveries=recoveries, open_until_s=until_s, recovered_at_s=recovered_s
    )


def ejection_s(first_s: float, count: int) -> float:
    """How long ejection number `count` lasts: twice as long as the one before, up to the maximum."""
    return min(EJECTION_MAX_S, first_s * 2.0 ** min(16, max(0, count - 1)))


# --- the form that workers share --------------------------------------------------------------------------------------

_CODES = {BreakerState.OPEN: 1, BreakerState.DOWN: 2, BreakerState.DENIED: 3}
_BREAKERS = {code: breaker for breaker, code in _CODES.items()}


def encode_ejection(health: EndpointHealth) -> int:
    """The end of an ejection and its state as one integer that grows with the end; 0 for an Endpoint not ejected."""
    code = _CODES.get(health.breaker)
    return int(health.open_until_s * 1000) * 4 + code if code else 0


def ejection_end_ms(ejection: int) -> int:
    """The end of an encoded ejection."""
    return ejection // 4


def health_from_ejection(ejection: int) -> EndpointHealth:
    """The health that follows from an ejection by another worker."""
    breaker = _BREAKERS.get(ejection % 4, BreakerState.OPEN)
    return EndpointHealth(breaker, ejections=1, open_until_s=ejection_end_ms(ejection) / 1000)
