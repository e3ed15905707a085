"""Least cost: the fewest expected seconds to the first token, plus the price at the Gateway's own exchange rate."""

from collections.abc import Sequence

from fleetgate.core.capacity.units import normalised_load
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn

TIE_SHARE = 0.1  # predictions are no better than this, so closer ones are equal and the price decides


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """By round trip, queue and uncached prefill in seconds, plus `seconds_per_usd` × the request's price.

    Within a tenth of the least, the cheaper one goes first. Where no Profile tells seconds, the least normalised load
    in the nearest region does. Source: GORGO and Mooncake, in one unit; ALGORITHMS.md section 8.2.
    """

    known = []
    for candidate in candidates:
        standing = load[candidate.slot]
        fit = standing.fit
        ttft_s = fit.ttft_s if fit is not None else float(candidate.distance)
        known.append((ttft_s + candidate.seconds_per_usd * standing.usd, standing, candidate))
    least_s = min(expected_s for expected_s, _, _ in known)
    tied_s = least_s * (1.0 + TIE_SHARE)
    places = []
    for expected_s, standing, candidate in known:
        share = normalised_load(standing.units, standing.in_flight)
        if expected_s <= tied_s:
            places.append((least_s, standing.usd, share, candidate.name, candidate))
        else:
            places.append((expected_s, 0.0, share, candidate.name, candidate))
    places.sort()  # names differ, so that candidates are never compared
    return Ranking([place[-1] for place in places], turn)
