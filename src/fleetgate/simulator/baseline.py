"""What the built-in comparisons have in common.

All of them see at once who is down, and move a request that failed before its first token once: more than many real
balancers do.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.world import Arrival, World


class TrueLoad(NamedTuple):
    """What a baseline is given. Units: `capacities` in requests/s by Deployment name, as measured beforehand."""

    fleet: SimulatedFleet
    capacities: Mapping[str, float]


class Baseline:
    """Sends every request at once to whom `choose` names; it learns nothing and refuses nothing."""

    def __init__(self, world: World, truth: TrueLoad) -> None:
        self.world = world
        self.fleet = truth.fleet
        self.in_flight = [0] * len(world.engines)
        self.weights = {d.slot: truth.capacities[d.name] for d in truth.fleet.deployments}
        self._credit: dict[int, float] = {}
        self._turns: dict[int, int] = {}
        self._turn = 0
        self._moved: set[int] = set()

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The engine to send to, or −1 to refuse."""
        raise NotImplementedError

    def arrive(self, arrival: Arrival, now_s: float) -> None:
        """Send it at once."""
        engine = self.choose(arrival, now_s)
        if engine < 0:
            self.world.refuse(arrival, "capacity_exhausted", now_s)
            return
        self.in_flight[engine] += 1
        self.world.send(arrival, engine, now_s)

    def first_token(self, arrival: Arrival, now_s: float) -> None:
        """Nothing to learn."""

    def finished(self, arrival: Arrival, now_s: float) -> None:
        """One less."""
        self.in_flight[arrival.replica] -= 1

    def failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """What was not answered yet is tried once more."""
        self.in_flight[arrival.replica] -= 1
        if arrival.first_s >= 0.0 or arrival.index in self._moved:
            self.world.refuse(arrival, "failed", now_s)
            return
        self._moved.add(arrival.index)
        self.arrive(arrival, now_s)

    def tick(self, now_s: float) -> None:
        """Nothing to correct."""

    def woken(self, now_s: float) -> None:
        """Nobody waits."""

    def limit_of(self, slot: int) -> int:
        """No limits."""
        return 0

    # --- ways to choose ---

    def up(self) -> list[int]:
        """Engines that answer their probe, or all when none does."""
        return [n for n in range(len(self.world.engines)) if self.world.is_up(n)] or list(range(len(self.in_flight)))

    def least(self, engines: Sequence[int]) -> int:
        """Fewest requests in flight; equal ones in turn."""
        self._turn += 1
        return min(engines, key=lambda n: (self.in_flight[n], (n + self._turn) % len(self.in_flight)))

    def weighted(self, weights: Mapping[int, float]) -> int:
        """Smooth weighted round robin over Deployments, replicas in turn."""
        engines: dict[int, list[int]] = {}
        for n in self.up():
            engines.setdefault(self.world.engines[n].deployment.slot, []).append(n)
        for slot in engines:
            self._credit[slot] = self._credit.get(slot, 0.0) + weights[slot]
        chosen = max(engines, key=lambda slot: (self._credit[slot], -slot))
        self._credit[chosen] -= sum(weights[slot] for slot in engines)
        self._turns[chosen] = self._turns.get(chosen, -1) + 1
        return engines[chosen][self._turns[chosen] % len(engines[chosen])]
