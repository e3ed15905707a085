"""Overflow: fill the ranks in order, the next one only when those before it are full."""

from collections.abc import Sequence
from math import fsum

from fleetgate.core.capacity.units import normalised_load, spill_limit
from fleetgate.core.routing.prefix_affinity import WARM_LOAD_MAX, WARM_SHARE_MIN
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn


def lead(candidates: Sequence[Candidate]) -> Candidate | None:
    """The only candidate of the best rank, price form and distance; None if several share it, as their load decides."""

    def preference(candidate: Candidate) -> tuple[int, int, int]:
        return (candidate.rank, candidate.paid_per_token, candidate.distance)

    best = min(map(preference, candidates), default=None)
    leaders = [candidate for candidate in candidates if preference(candidate) == best]
    return leaders[0] if len(leaders) == 1 else None


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """Ranks in order, a candidate past its spill limit after those below it; within a rank nearest, then least loaded.

    Within a rank, supply paid by the hour is before supply paid per token, and the proxy's own region before others.
    Among the rest, a candidate that saw the prompt before is first unless it is much busier than its rank. Names break
    ties, so the order in which Deployments are written changes nothing.
    """

    ranked = []
    for candidate in candidates:
        state = load[candidate.slot]
        limit = spill_limit(state.limit, candidate.overflow_at)
        ranked.append(
            (
                limit > 0 and state.in_flight >= limit,
                candidate.rank,
                candidate.paid_per_token,
                candidate.distance,
                state.warm < WARM_SHARE_MIN or not _may_be_preferred(candidate, candidates, load),
                normalised_load(state.units, state.in_flight),
                candidate.name,
                candidate,
            )
        )
    ranked.sort()  # names differ, so candidates are never compared
    return Ranking([entry[-1] for entry in ranked], turn)


def _may_be_preferred(candidate: Candidate, candidates: Sequence[Candidate], load: Load) -> bool:
    """Whether its load is not much over the mean of its rank."""
    states = [load[other.slot] for other in candidates if other.rank == candidate.rank]
    shares = [normalised_load(state.units, state.in_flight) for state in states]
    state = load[candidate.slot]
    own = normalised_load(state.units, state.in_flight)
    return own <= WARM_LOAD_MAX * fsum(shares) / len(shares)
