"""Overflow: the first rank that has room, in rank order; the next one only when it is full."""

from collections.abc import Sequence

from fleetgate.core.capacity import normalised_load
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
    others. Names break ties, so that the order in which Deployments are written changes nothing.
    """

    def place(candidate: Candidate) -> tuple[bool, int, int, int, float, str]:
        in_flight = load[candidate.slot].in_flight
        spilt = bool(candidate.spill_limit) and in_flight >= candidate.spill_limit
        share = normalised_load(candidate.units, in_flight)
        return (spilt, candidate.rank, candidate.paid_per_token, candidate.distance, share, candidate.name)

    return Ranking(sorted(candidates, key=place), turn)
