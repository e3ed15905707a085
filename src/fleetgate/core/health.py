"""Whether an Endpoint is fit for traffic: one circuit breaker fed by real requests and by probes alike.

    closed ──3 broken in a row, or──▶ open ──back-off over──▶ half_open ──a request went well──▶ closed
             half of 20 in 10 s        ▲                          │
                                       └──────a request broke─────┘
    closed ──its region is lost──▶ half_open

A refusal because of load ("full") is no event here: it moves load and teaches capacity, it never opens a breaker.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

BROKEN_IN_A_ROW = 3  # one reset is chance, three are a fault. ALGORITHMS.md section 8.4
RESULTS_MIN, BROKEN_SHARE, RESULTS_S = 20, 0.5, 10.0  # a grey failure: some requests get through. FAULTS.md row 58
REGION_DEPLOYMENTS, REGION_S = 2, 2.0  # so many that open so close together have one cause
EJECTION_FIRST_S = 2.0
EJECTION_MAX_S = 60.0  # a region that is back must not wait longer than a person would


class Breaker(StrEnum):
    """The three states."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Sign(StrEnum):
    """What was seen of an Endpoint."""

    WENT_WELL = "went_well"
    BROKE = "broke"
    PROBE_WELL = "probe_well"
    PROBE_BROKE = "probe_broke"
    REGION_LOST = "region_lost"  # others of its region opened close together


class Health(msgspec.Struct, frozen=True):
    """One Endpoint's state. Units: seconds of the clock that the shell passes in.

    Shape: `results` and `broken` are of requests since `counts_since_s`, counted from the first that broke.
    """

    breaker: Breaker = Breaker.CLOSED
    broken_in_a_row: int = 0
    ejections: int = 0
    open_until_s: float = 0.0
    recovered_at_s: float = float("-inf")
    counts_since_s: float = float("-inf")
    results: int = 0
    broken: int = 0


HEALTHY = Health()


def after(health: Health, sign: Sign, now_s: float) -> Health:
    """The state that follows a sign; the same object when nothing changed."""
    match current(health, now_s), sign:
        case Breaker.CLOSED, Sign.WENT_WELL:
            return _well(health, now_s)
        case Breaker.CLOSED, Sign.PROBE_WELL:
            return health if not health.broken_in_a_row else msgspec.structs.replace(health, broken_in_a_row=0)
        case Breaker.CLOSED, Sign.PROBE_BROKE:
            return _broke(health, now_s)
        case Breaker.CLOSED, Sign.BROKE:
            return _broke(_counted(health, now_s, 1), now_s)
        case Breaker.CLOSED, Sign.REGION_LOST:
            return Health(breaker=Breaker.HALF_OPEN, open_until_s=now_s)
        case Breaker.OPEN, Sign.PROBE_WELL:
            # A probe proves the port, not the engine: let one real request try.
            return msgspec.structs.replace(health, breaker=Breaker.HALF_OPEN, open_until_s=now_s)
        case Breaker.HALF_OPEN, Sign.WENT_WELL:
            return Health(recovered_at_s=now_s)
        case Breaker.HALF_OPEN, Sign.BROKE | Sign.PROBE_BROKE:
            return _open(health, now_s)
        case _:  # late news of requests that were sent before the breaker opened
            return health


def current(health: Health, now_s: float) -> Breaker:
    """The state now: an open breaker whose back-off is over is half open."""
    if health.breaker is Breaker.OPEN and now_s >= health.open_until_s:
        return Breaker.HALF_OPEN
    return health.breaker


def _counted(health: Health, now_s: float, broken: int) -> Health:
    """One more result of a request."""
    since_s, results, before = health.counts_since_s, health.results, health.broken
    if now_s - since_s > RESULTS_S:
        since_s, results, before = now_s, 0, 0
    return msgspec.structs.replace(health, counts_since_s=since_s, results=results + 1, broken=before + broken)


def _well(health: Health, now_s: float) -> Health:
    if not health.broken_in_a_row and not health.results:
        return health
    if now_s - health.counts_since_s > RESULTS_S:  # whatever broke is long ago
        return Health(recovered_at_s=health.recovered_at_s)
    return msgspec.structs.replace(_counted(health, now_s, 0), broken_in_a_row=0)


def _broke(health: Health, now_s: float) -> Health:
    in_a_row = health.broken_in_a_row + 1
    grey = health.results >= RESULTS_MIN and health.broken > BROKEN_SHARE * health.results
    if in_a_row >= BROKEN_IN_A_ROW or grey:
        return _open(health, now_s)
    return msgspec.structs.replace(health, broken_in_a_row=in_a_row)


def is_region_lost(opened_s: Mapping[str, float], now_s: float) -> bool:
    """Whether so many Deployments of a region opened just now that it must be the region. Shape: when, by name."""
    return sum(now_s - moment_s <= REGION_S for moment_s in opened_s.values()) >= REGION_DEPLOYMENTS


def _open(health: Health, now_s: float) -> Health:
    ejections = health.ejections + 1
    pause_s = min(EJECTION_MAX_S, EJECTION_FIRST_S * 2 ** (ejections - 1))
    return Health(breaker=Breaker.OPEN, ejections=ejections, open_until_s=now_s + pause_s)
