"""Least cost: the fewest expected seconds to the first token, plus the price at the Gateway's exchange rate."""

from collections.abc import Sequence

from fleetgate.core.capacity.units import normalised_load
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn

TIE_SHARE = 0.1  # predictions are no better than this, so among closer ones the price decides


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """By round trip, queue and uncached prefill in seconds, plus `seconds_per_usd` × the request's price.

    Among candidates within a tenth of the least, the cheaper one is first. Without a Profile there are no seconds, and
    the least normalised load in the nearest region is first.
    Source: GORGO and Mooncake, in one unit.
    """

    known = []
    for candidate in candidates:
        state = load[candidate.slot]
        prediction = state.prediction
        ttft_s = prediction.ttft_s if prediction is not None else float(candidate.distance)
        known.append((ttft_s + candidate.seconds_per_usd * state.usd, state, candidate))
    least_s = min(expected_s for expected_s, _, _ in known)
    tied_s = least_s * (1.0 + TIE_SHARE)
    ranked = []
    for expected_s, state, candidate in known:
        share = normalised_load(state.units, state.in_flight)
        if expected_s <= tied_s:
            ranked.append((least_s, state.usd, share, candidate.name, candidate))
        else:
            ranked.append((expected_s, 0.0, share, candidate.name, candidate))
    ranked.sort()  # names differ, so candidates are never compared
    return Ranking([entry[-1] for entry in ranked], turn)
