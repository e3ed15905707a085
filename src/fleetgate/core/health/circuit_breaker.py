"""Whether an Endpoint is fit for traffic: one circuit breaker, fed by real requests and by probes alike.

`TRANSITIONS` is the whole of it: what is not listed there changes nothing. docs/reference/health.md is drawn from it.
A refusal because of load ("full") is no sign here: it moves load and teaches capacity, it never opens a breaker.
"""

from enum import StrEnum
from typing import NamedTuple

import msgspec

from fleetgate.core.health.outlier_detection import NO_RESULTS, ResultCounts

CONSECUTIVE_FAILURES_MAX = 3  # one reset is chance, three are a fault. ALGORITHMS.md section 8.4
EJECTION_FIRST_S = 2.0
DENIED_FIRST_S = 30.0  # somebody has to renew the credential
EJECTION_MAX_S = 60.0  # a region that is back must not wait longer than a person would
JITTER = 0.2  # proxies that lost an Endpoint together do not come back to it together
STEADY_S = 60.0  # in for so long, and its earlier ejections are forgotten
FLAPPING_EJECTIONS = 3  # out so often without having been steady: its probes are not believed any more
RECOVERY_SUCCESSES_MAX = 3  # good requests in a row that one who flaps has to show


class BreakerState(StrEnum):
    """The five states. Only `closed` and `half_open` get requests, the latter few at a time."""

    CLOSED = "closed"
    OPEN = "open"  # it can be reached, but its answers break
    DOWN = "down"  # it cannot be reached
    DENIED = "denied"  # it refuses our credential
    HALF_OPEN = "half_open"


class Signal(StrEnum):
    """What was seen of an Endpoint."""

    WENT_WELL = "went_well"
    BROKE = "broke"
    MOSTLY_BROKE = "mostly_broke"  # found out here from the results, never told by a shell
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    SLOW = "slow"
    PROBE_WELL = "probe_well"
    PROBE_BROKE = "probe_broke"
    REGION_LOST = "region_lost"  # others of its region went out close together
    EVERYBODY_OUT = "everybody_out"  # nobody is in, and this one is the least bad
    BACK_OFF_OVER = "back_off_over"  # told by the clock
    NEW_CREDENTIAL = "new_credential"


class Transition(NamedTuple):
    """Where a sign leads. Shape: `after` is how many in a row it takes; 0 is one for each ejection, at most three."""

    to: BreakerState
    in_a_row: int = 1
    verified: bool = True  # also of one that flaps


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
    (_OPEN, Signal.EVERYBODY_OUT): Transition(_HALF_OPEN),
    # A probe proves the port, not the engine: it brings back only whom it, or a refused connection, took out.
    (_OPEN, Signal.PROBE_BROKE): Transition(_DOWN),
    (_OPEN, Signal.DENIED): Transition(_DENIED),
    (_DOWN, Signal.BACK_OFF_OVER): Transition(_HALF_OPEN),
    (_DOWN, Signal.EVERYBODY_OUT): Transition(_HALF_OPEN),
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
    """One Endpoint's state. Units: seconds of the clock that the shell passes in.

    Shape: `ejections` since it was last steady, `returns` how many attempts to come back from the last one failed;
    probes are counted apart from requests, whose port may answer while they break.
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


def next_health(health: EndpointHealth, sign: Signal, now_s: float, entropy: float = 0.5) -> EndpointHealth:
    """The state that follows a sign; the same object when nothing changed. Shape: `entropy` is 0 to 1."""
    if health.breaker in EJECTED_STATES and now_s >= health.open_until_s:
        health = _enter(health, TRANSITIONS[health.breaker, Signal.BACK_OFF_OVER].to, now_s, entropy)
    health = _counted(health, sign, now_s)
    move = TRANSITIONS.get((health.breaker, sign))
    if health.breaker is _CLOSED and health.results.mostly_broke and sign in (Signal.BROKE, Signal.UNREACHABLE):
        move = TRANSITIONS[_CLOSED, Signal.MOSTLY_BROKE]
    if move is None or (health.ejections >= FLAPPING_EJECTIONS and not move.verified):
        return health
    needed = move.in_a_row or min(RECOVERY_SUCCESSES_MAX, max(1, health.ejections))
    return _enter(health, move.to, now_s, entropy) if _in_a_row(health, sign) >= needed or needed == 1 else health


def current_state(health: EndpointHealth, now_s: float) -> BreakerState:
    """The state now: an Endpoint that is out and whose back-off is over is half open."""
    if health.breaker in EJECTED_STATES and now_s >= health.open_until_s:
        return BreakerState.HALF_OPEN
    return health.breaker


def _in_a_row(health: EndpointHealth, sign: Signal) -> int:
    if sign is Signal.WENT_WELL:
        return health.consecutive_successes
    return health.consecutive_probe_failures if sign is Signal.PROBE_BROKE else health.consecutive_failures


def _counted(health: EndpointHealth, sign: Signal, now_s: float) -> EndpointHealth:
    """What is remembered of a sign besides the state."""
    replace = msgspec.structs.replace
    match health.breaker, sign:
        case BreakerState.CLOSED, Signal.WENT_WELL:
            return _well(health, now_s)
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


def _well(health: EndpointHealth, now_s: float) -> EndpointHealth:
    """A request went well, which says more than any probe."""
    if health.results.is_over(now_s):  # whatever broke is long ago
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
    ejections, returns, until_s = health.ejections, health.recoveries, health.open_until_s
    if to is BreakerState.HALF_OPEN:
        recovered_s = health.recovered_at_s
        return EndpointHealth(
            to, ejections=ejections, recoveries=returns, open_until_s=now_s, recovered_at_s=recovered_s
        )
    if health.breaker is BreakerState.HALF_OPEN and ejections:
        returns += 1
    elif health.breaker in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
        ejections, returns = (1 if now_s - health.recovered_at_s > STEADY_S else ejections + 1), 0
    if health.breaker not in EJECTED_STATES or to is BreakerState.DENIED:
        until_s = now_s + ejection_s(
            DENIED_FIRST_S if to is BreakerState.DENIED else EJECTION_FIRST_S, ejections + returns
        )
        until_s += (until_s - now_s) * JITTER * (2.0 * entropy - 1.0)
        until_s = min(until_s, now_s + EJECTION_MAX_S)
    return EndpointHealth(
        to, ejections=ejections, recoveries=returns, open_until_s=until_s, recovered_at_s=health.recovered_at_s
    )


def ejection_s(first_s: float, times: int) -> float:
    """How long it stays out the so-manieth time: each twice the one before."""
    return min(EJECTION_MAX_S, first_s * 2.0 ** min(16, max(0, times - 1)))


# --- as other workers read it -----------------------------------------------------------------------------------------

_CODES = {BreakerState.OPEN: 1, BreakerState.DOWN: 2, BreakerState.DENIED: 3}
_BREAKERS = {code: breaker for breaker, code in _CODES.items()}


def encode_ejection(health: EndpointHealth) -> int:
    """Until when it is out and why, in one integer that grows with the moment; 0 while it is in."""
    code = _CODES.get(health.breaker)
    return int(health.open_until_s * 1000) * 4 + code if code else 0


def ejection_end_ms(told: int) -> int:
    """The moment in such an integer."""
    return told // 4


def health_from_ejection(told: int) -> EndpointHealth:
    """What another worker told, as one's own state."""
    breaker = _BREAKERS.get(told % 4, BreakerState.OPEN)
    return EndpointHealth(breaker, ejections=1, open_until_s=ejection_end_ms(told) / 1000)
