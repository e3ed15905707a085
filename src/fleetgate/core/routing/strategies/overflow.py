"""Overflow: the first rank that has room, in rank order; the next one only when it is full."""

from collections.abc import Sequence
from math import fsum

from fleetgate.core.capacity.units import normalised_load, spill_limit
from fleetgate.core.routing.prefix_affinity import WARM_LOAD_MAX, WARM_SHARE_MIN
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn


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

    places = []
    for candidate in candidates:
        standing = load[candidate.slot]
        limit = spill_limit(standing.limit, candidate.overflow_at)
        places.append(
            (
                limit > 0 and standing.in_flight >= limit,
                candidate.rank,
                candidate.paid_per_token,
                candidate.distance,
                standing.warm < WARM_SHARE_MIN or not _may_be_preferred(candidate, candidates, load),
                normalised_load(standing.units, standing.in_flight),
                candidate.name,
                candidate,
            )
        )
    places.sort()  # names differ, so that candidates are never compared
    return Ranking([place[-1] for place in places], turn)


def _may_be_preferred(candidate: Candidate, candidates: Sequence[Candidate], load: Load) -> bool:
    """Whether it is not much busier than the rest of its rank."""
    standings = [load[other.slot] for other in candidates if other.rank == candidate.rank]
    shares = [normalised_load(standing.units, standing.in_flight) for standing in standings]
    standing = load[candidate.slot]
    own = normalised_load(standing.units, standing.in_flight)
    return own <= WARM_LOAD_MAX * fsum(shares) / len(shares)
