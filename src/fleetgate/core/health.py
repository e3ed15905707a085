"""Whether an Endpoint is fit for traffic: one circuit breaker fed by real requests and by probes alike.

    closed ──3 broken in a row──▶ open ──back-off over──▶ half_open ──a request went well──▶ closed
                                   ▲                          │
                                   └──────a request broke─────┘

A refusal because of load ("full") is no event here: it moves load and teaches capacity, it never opens a breaker.
"""

from enum import StrEnum

import msgspec

BROKEN_IN_A_ROW = 3  # one reset is chance, three are a fault. ALGORITHMS.md section 8.4
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


class Health(msgspec.Struct, frozen=True):
    """One Endpoint's state. Units: seconds of the clock that the shell passes in."""

    breaker: Breaker = Breaker.CLOSED
    broken_in_a_row: int = 0
    ejections: int = 0
    open_until_s: float = 0.0
    recovered_at_s: float = float("-inf")


HEALTHY = Health()


def after(health: Health, sign: Sign, now_s: float) -> Health:
    """The state that follows a sign; the same object when nothing changed."""
    match current(health, now_s), sign:
        case Breaker.CLOSED, Sign.WENT_WELL | Sign.PROBE_WELL:
            return health if not health.broken_in_a_row else msgspec.structs.replace(health, broken_in_a_row=0)
        case Breaker.CLOSED, Sign.BROKE | Sign.PROBE_BROKE:
            broken = health.broken_in_a_row + 1
            if broken >= BROKEN_IN_A_ROW:
                return _open(health, now_s)
            return msgspec.structs.replace(health, broken_in_a_row=broken)
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


def _open(health: Health, now_s: float) -> Health:
    ejections = health.ejections + 1
    pause_s = min(EJECTION_MAX_S, EJECTION_FIRST_S * 2 ** (ejections - 1))
    return Health(breaker=Breaker.OPEN, ejections=ejections, open_until_s=now_s + pause_s)
