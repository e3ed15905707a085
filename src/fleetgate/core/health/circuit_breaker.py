"""Whether an Endpoint is fit for traffic: one circuit breaker, fed by real requests and by probes alike.

`MOVES` is the whole of it: what is not listed there changes nothing. docs/reference/health.md is drawn from it.
A refusal because of load ("full") is no sign here: it moves load and teaches capacity, it never opens a breaker.
"""

from enum import StrEnum
from typing import NamedTuple

import msgspec

from fleetgate.core.health.outlier_detection import NO_RESULTS, Results

BROKEN_IN_A_ROW = 3  # one reset is chance, three are a fault. ALGORITHMS.md section 8.4
EJECTION_FIRST_S = 2.0
DENIED_FIRST_S = 30.0  # somebody has to renew the credential
EJECTION_MAX_S = 60.0  # a region that is back must not wait longer than a person would
JITTER = 0.2  # proxies that lost an Endpoint together do not come back to it together
STEADY_S = 60.0  # in for so long, and its earlier ejections are forgotten
FLAPS = 3  # out so often without having been steady: its probes are not believed any more
RETURNS_MAX = 3  # good requests in a row that one who flaps has to show


class Breaker(StrEnum):
    """The five states. Only `closed` and `half_open` get requests, the latter few at a time."""

    CLOSED = "closed"
    OPEN = "open"  # it can be reached, but its answers break
    DOWN = "down"  # it cannot be reached
    DENIED = "denied"  # it refuses our credential
    HALF_OPEN = "half_open"


class Sign(StrEnum):
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


class Move(NamedTuple):
    """Where a sign leads. Shape: `after` is how many in a row it takes; 0 is one for each ejection, at most three."""

    to: Breaker
    after: int = 1
    believed: bool = True  # also of one that flaps


_CLOSED, _OPEN, _DOWN, _DENIED, _HALF_OPEN = Breaker
OUT = (_OPEN, _DOWN, _DENIED)

MOVES: dict[tuple[Breaker, Sign], Move] = {
    (_CLOSED, Sign.BROKE): Move(_OPEN, after=BROKEN_IN_A_ROW),
    (_CLOSED, Sign.MOSTLY_BROKE): Move(_OPEN),
    (_CLOSED, Sign.SLOW): Move(_OPEN),
    (_CLOSED, Sign.UNREACHABLE): Move(_DOWN, after=BROKEN_IN_A_ROW),
    (_CLOSED, Sign.PROBE_BROKE): Move(_DOWN, after=BROKEN_IN_A_ROW),
    (_CLOSED, Sign.DENIED): Move(_DENIED),
    (_CLOSED, Sign.REGION_LOST): Move(_HALF_OPEN),
    (_OPEN, Sign.BACK_OFF_OVER): Move(_HALF_OPEN),
    (_OPEN, Sign.EVERYBODY_OUT): Move(_HALF_OPEN),
    # A probe proves the port, not the engine: it brings back only whom it, or a refused connection, took out.
    (_OPEN, Sign.PROBE_BROKE): Move(_DOWN),
    (_OPEN, Sign.DENIED): Move(_DENIED),
    (_DOWN, Sign.BACK_OFF_OVER): Move(_HALF_OPEN),
    (_DOWN, Sign.EVERYBODY_OUT): Move(_HALF_OPEN),
    (_DOWN, Sign.PROBE_WELL): Move(_HALF_OPEN, believed=False),
    (_DOWN, Sign.DENIED): Move(_DENIED),
    (_DENIED, Sign.BACK_OFF_OVER): Move(_HALF_OPEN),
    (_DENIED, Sign.NEW_CREDENTIAL): Move(_HALF_OPEN),
    (_HALF_OPEN, Sign.WENT_WELL): Move(_CLOSED, after=0),
    (_HALF_OPEN, Sign.BROKE): Move(_OPEN),
    (_HALF_OPEN, Sign.SLOW): Move(_OPEN),
    (_HALF_OPEN, Sign.UNREACHABLE): Move(_DOWN),
    (_HALF_OPEN, Sign.PROBE_BROKE): Move(_DOWN),
    (_HALF_OPEN, Sign.DENIED): Move(_DENIED),
}


class Health(msgspec.Struct, frozen=True):
    """One Endpoint's state. Units: seconds of the clock that the shell passes in.

    Shape: `ejections` since it was last steady, `returns` how many attempts to come back from the last one failed;
    probes are counted apart from requests, whose port may answer while they break.
    """

    breaker: Breaker = Breaker.CLOSED
    broken_in_a_row: int = 0
    probes_broken_in_a_row: int = 0
    well_in_a_row: int = 0
    ejections: int = 0
    returns: int = 0
    open_until_s: float = 0.0
    recovered_at_s: float = float("-inf")
    results: Results = NO_RESULTS


HEALTHY = Health()


def after(health: Health, sign: Sign, now_s: float, entropy: float = 0.5) -> Health:
    """The state that follows a sign; the same object when nothing changed. Shape: `entropy` is 0 to 1."""
    if health.breaker in OUT and now_s >= health.open_until_s:
        health = _enter(health, MOVES[health.breaker, Sign.BACK_OFF_OVER].to, now_s, entropy)
    health = _counted(health, sign, now_s)
    move = MOVES.get((health.breaker, sign))
    if health.breaker is _CLOSED and health.results.mostly_broke and sign in (Sign.BROKE, Sign.UNREACHABLE):
        move = MOVES[_CLOSED, Sign.MOSTLY_BROKE]
    if move is None or (health.ejections >= FLAPS and not move.believed):
        return health
    needed = move.after or min(RETURNS_MAX, max(1, health.ejections))
    return _enter(health, move.to, now_s, entropy) if _in_a_row(health, sign) >= needed or needed == 1 else health


def current(health: Health, now_s: float) -> Breaker:
    """The state now: an Endpoint that is out and whose back-off is over is half open."""
    if health.breaker in OUT and now_s >= health.open_until_s:
        return Breaker.HALF_OPEN
    return health.breaker


def _in_a_row(health: Health, sign: Sign) -> int:
    if sign is Sign.WENT_WELL:
        return health.well_in_a_row
    return health.probes_broken_in_a_row if sign is Sign.PROBE_BROKE else health.broken_in_a_row


def _counted(health: Health, sign: Sign, now_s: float) -> Health:
    """What is remembered of a sign besides the state."""
    replace = msgspec.structs.replace
    match health.breaker, sign:
        case Breaker.CLOSED, Sign.WENT_WELL:
            return _well(health, now_s)
        case Breaker.CLOSED, Sign.BROKE | Sign.UNREACHABLE:
            results = health.results.more(now_s, broken=True)
            return replace(health, broken_in_a_row=health.broken_in_a_row + 1, results=results)
        case Breaker.CLOSED, Sign.PROBE_BROKE:
            return replace(health, probes_broken_in_a_row=health.probes_broken_in_a_row + 1)
        case Breaker.CLOSED, Sign.PROBE_WELL:
            return replace(health, probes_broken_in_a_row=0) if health.probes_broken_in_a_row else health
        case Breaker.HALF_OPEN, Sign.WENT_WELL:
            return replace(health, well_in_a_row=health.well_in_a_row + 1)
        case _:
            return health


def _well(health: Health, now_s: float) -> Health:
    """A request went well, which says more than any probe."""
    if health.results.is_over(now_s):  # whatever broke is long ago
        if now_s - health.recovered_at_s > STEADY_S:
            return HEALTHY
        if health.results is NO_RESULTS and not health.broken_in_a_row and not health.probes_broken_in_a_row:
            return health
        return Health(ejections=health.ejections, recovered_at_s=health.recovered_at_s)
    results = health.results.more(now_s, broken=False)
    return msgspec.structs.replace(health, broken_in_a_row=0, probes_broken_in_a_row=0, results=results)


def _enter(health: Health, to: Breaker, now_s: float, entropy: float) -> Health:
    if to is Breaker.CLOSED:
        return Health(ejections=health.ejections, recovered_at_s=now_s)
    ejections, returns, until_s = health.ejections, health.returns, health.open_until_s
    if to is Breaker.HALF_OPEN:
        recovered_s = health.recovered_at_s
        return Health(to, ejections=ejections, returns=returns, open_until_s=now_s, recovered_at_s=recovered_s)
    if health.breaker is Breaker.HALF_OPEN and ejections:
        returns += 1
    elif health.breaker in (Breaker.CLOSED, Breaker.HALF_OPEN):
        ejections, returns = (1 if now_s - health.recovered_at_s > STEADY_S else ejections + 1), 0
    if health.breaker not in OUT or to is Breaker.DENIED:
        until_s = now_s + pause_s(DENIED_FIRST_S if to is Breaker.DENIED else EJECTION_FIRST_S, ejections + returns)
        until_s += (until_s - now_s) * JITTER * (2.0 * entropy - 1.0)
        until_s = min(until_s, now_s + EJECTION_MAX_S)
    return Health(to, ejections=ejections, returns=returns, open_until_s=until_s, recovered_at_s=health.recovered_at_s)


def pause_s(first_s: float, times: int) -> float:
    """How long it stays out the so-manieth time: each twice the one before."""
    return min(EJECTION_MAX_S, first_s * 2.0 ** min(16, max(0, times - 1)))


# --- as other workers read it -----------------------------------------------------------------------------------------

_CODES = {Breaker.OPEN: 1, Breaker.DOWN: 2, Breaker.DENIED: 3}
_BREAKERS = {code: breaker for breaker, code in _CODES.items()}


def told_ms(health: Health) -> int:
    """Until when it is out and why, in one integer that grows with the moment; 0 while it is in."""
    code = _CODES.get(health.breaker)
    return int(health.open_until_s * 1000) * 4 + code if code else 0


def until_ms(told: int) -> int:
    """The moment in such an integer."""
    return told // 4


def adopted(told: int) -> Health:
    """What another worker told, as one's own state."""
    breaker = _BREAKERS.get(told % 4, Breaker.OPEN)
    return Health(breaker, ejections=1, open_until_s=until_ms(told) / 1000)
