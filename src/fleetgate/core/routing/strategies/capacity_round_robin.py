"""Capacity-based round robin: shares in proportion to each Deployment's free capacity, evenly interleaved."""

from collections.abc import Sequence
from math import fsum

from fleetgate.core.capacity.units import available_units, normalised_load
from fleetgate.core.routing.prefix_affinity import WARM_CREDIT
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """Smooth weighted round robin over available capacity; if none is free, the least normalised load.

    Each decision raises every candidate's credit by its weight, takes the highest and lowers that one by the sum, so a
    changed weight acts at once. Credit is in shares of the sum, which bounds it (−1 to 1 for each candidate) however
    the weights change. The others follow in order of credit, as fallbacks.
    Source: smooth weighted round robin as in nginx.
    """
    states = [load[candidate.slot] for candidate in candidates]
    weights = [available_units(s.health, s.units, s.in_flight, s.limit or s.places) for s in states]
    total = fsum(weights)  # exact, so that the order of the summands changes nothing
    if total <= 0.0:
        loads = {c.slot: normalised_load(load[c.slot].units, load[c.slot].in_flight) for c in candidates}
        return Ranking(sorted(candidates, key=lambda c: (loads[c.slot], c.name)), turn)
    credit, ranked = {}, []
    for candidate, state, weight in zip(candidates, states, weights, strict=True):
        slot = candidate.slot
        credit[slot] = share = turn.get(slot, 0.0) + weight / total
        ranked.append((-share - WARM_CREDIT * state.warm, candidate.name, candidate))
    ranked.sort()  # names differ, so candidates are never compared
    credit[ranked[0][2].slot] -= 1.0
    return Ranking([candidate for _, _, candidate in ranked], credit)
