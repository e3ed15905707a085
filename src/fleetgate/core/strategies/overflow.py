"""Overflow: the first rank that has room, in rank order; the next one only when it is full."""

from collections.abc import Sequence
from math import fsum

from fleetgate.core.affinity import WARM_LOAD_MAX, WARM_SHARE_MIN
from fleetgate.core.capacity import normalised_load, spill_limit
from fleetgate.core.strategies import Candidate, Load, Ranking, Turn


def lead(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one of the first rank, where rank and distance alone tell; among equals their load decides."""

    def place(candidate: Candidate) -> tuple[int, int, int]:
        return (candidate.rank, candidate.paid_per_token, candidate.distance)

    first = min(map(place, candidates), default=None)
    leaders = [candidate for candidate in candidates if place(candidate) == first]
    return leaders[0] if len(leaders) == 1 else None


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """Ranks in order, a rank past its spill limit after those below it; inside one the nearest, then the least loaded.

    Supply paid by the hour goes before supply paid per token of the same rank, and the proxy's own region before
    others; among those the one that has seen the prompt before, unless it is much busier than the rest. Names break
    ties, so that the order in which Deployments are written changes nothing.
    """

    def share(candidate: Candidate) -> float:
        standing = load[candidate.slot]
        return normalised_load(standing.units, standing.in_flight)

    def warm(candidate: Candidate) -> bool:
        if load[candidate.slot].warm < WARM_SHARE_MIN:
            return False
        shares = [share(other) for other in candidates if other.rank == candidate.rank]
        return share(candidate) <= WARM_LOAD_MAX * fsum(shares) / len(shares)

    def place(candidate: Candidate) -> tuple[bool, int, int, int, bool, float, str]:
        standing = load[candidate.slot]
        limit = spill_limit(standing.limit, candidate.overflow_at)
        spilt = bool(limit) and standing.in_flight >= limit
        return (
            spilt,
            candidate.rank,
            candidate.paid_per_token,
            candidate.distance,
            not warm(candidate),
            share(candidate),
            candidate.name,
        )

    return Ranking(sorted(candidates, key=place), turn)
