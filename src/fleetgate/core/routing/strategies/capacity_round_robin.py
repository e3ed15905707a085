"""Capacity-based round robin: shares in proportion to what each Deployment has free, perfectly interleaved."""

from collections.abc import Sequence
from math import fsum

from fleetgate.core.capacity.units import available_units, normalised_load
from fleetgate.core.routing.prefix_affinity import WARM_CREDIT
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn


def order(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """Smooth weighted round robin over available capacity; without any, the least normalised load.

    Each pick raises every candidate's credit by its weight, takes the highest and lowers that one by the sum, so a
    weight that changes on every pick acts at once. Credit is in shares of the sum, which keeps it bounded (−1 to 1 a
    candidate) however the weights move. The rest follow by credit: they are the fallbacks.
    Source: smooth weighted round robin as in nginx; weights from ALGORITHMS.md section 8.1.
    """
    standings = [load[candidate.slot] for candidate in candidates]
    weights = [available_units(s.health, s.units, s.in_flight, s.limit or s.places) for s in standings]
    total = fsum(weights)  # exact, so that the order of summands changes nothing
    if total <= 0.0:
        loads = {c.slot: normalised_load(load[c.slot].units, load[c.slot].in_flight) for c in candidates}
        return Ranking(sorted(candidates, key=lambda c: (loads[c.slot], c.name)), turn)
    credit, places = {}, []
    for candidate, standing, weight in zip(candidates, standings, weights, strict=True):
        slot = candidate.slot
        credit[slot] = share = turn.get(slot, 0.0) + weight / total
        places.append((-share - WARM_CREDIT * standing.warm, candidate.name, candidate))
    places.sort()  # names differ, so that candidates are never compared
    credit[places[0][2].slot] -= 1.0
    return Ranking([candidate for _, _, candidate in places], credit)
