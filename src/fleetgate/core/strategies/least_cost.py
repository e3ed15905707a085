"""Least cost: the fewest expected seconds to the first token, plus the price at the Gateway's own exchange rate."""

from collections.abc import Sequence

from fleetgate.core.capacity import normalised_load
from fleetgate.core.strategies import Candidate, Load, Ranking, Turn

TIE_SHARE = 0.1  # predictions are no better than this, so closer ones are equal and the price decides


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """By round trip, queue and uncached prefill in seconds, plus `seconds_per_usd` × the request's price.

    Within a tenth of the least, the cheaper one goes first. Where no Profile tells seconds, the least normalised load
    in the nearest region does. Source: GORGO and Mooncake, in one unit; ALGORITHMS.md section 8.2.
    """

    def seconds(candidate: Candidate) -> float:
        standing = load[candidate.slot]
        ttft_s = standing.fit.ttft_s if standing.fit is not None else float(candidate.distance)
        return ttft_s + candidate.seconds_per_usd * standing.usd

    least_s = min(map(seconds, candidates))

    def place(candidate: Candidate) -> tuple[float, float, float, str]:
        standing, expected_s = load[candidate.slot], seconds(candidate)
        tied = expected_s <= least_s * (1.0 + TIE_SHARE)
        share = normalised_load(standing.units, standing.in_flight)
        return (least_s if tied else expected_s, standing.usd if tied else 0.0, share, candidate.name)

    return Ranking(sorted(candidates, key=place), turn)
