"""The common part of the built-in comparisons.

Every baseline sees at once which engines are down, and moves a request that failed before its first token once. Many
real balancers do less.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.serving.world import Arrival, World


class BaselineInputs(NamedTuple):
    """What a baseline knows. Units: `capacities` in requests/s by Deployment name, as measured beforehand."""

    fleet: SimulatedFleet
    capacities: Mapping[str, float]


class BaselineBalancer:
    """Sends every request at once to the engine that `choose` returns; it learns nothing and refuses nothing."""

    def __init__(self, world: World, inputs: BaselineInputs) -> None:
        self.world = world
        self.fleet = inputs.fleet
        self.in_flight = [0] * len(world.engines)
        self.weights = {d.slot: inputs.capacities[d.name] for d in inputs.fleet.deployments}
        self._credit: dict[int, float] = {}
        self._turns: dict[int, int] = {}
        self._turn = 0
        self._moved: set[int] = set()

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The engine to send to, or −1 to refuse."""
        raise NotImplementedError

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        """Send the request at once."""
        engine = self.choose(arrival, now_s)
        if engine < 0:
            self.world.refuse(arrival, "capacity_exhausted", now_s)
            return
        self.in_flight[engine] += 1
        self.world.send(arrival, engine, now_s)

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        """Do nothing: a baseline does not learn."""

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        """Count one request less in flight."""
        self.in_flight[arrival.replica] -= 1

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """Try a request once more if it has no token yet."""
        self.in_flight[arrival.replica] -= 1
        if arrival.first_s >= 0.0 or arrival.index in self._moved:
            self.world.refuse(arrival, "failed", now_s)
            return
        self._moved.add(arrival.index)
        self.on_arrival(arrival, now_s)

    def on_tick(self, now_s: float) -> None:
        """Do nothing: there is nothing to correct."""

    def on_wake(self, now_s: float) -> None:
        """Do nothing: no request waits."""

    def limit_of(self, slot: int) -> int:
        """0: a baseline has no limits."""
        return 0

    # --- ways to choose ---

    def up(self) -> list[int]:
        """Engines that answer their probe, or all if none does."""
        return [n for n in range(len(self.world.engines)) if self.world.is_up(n)] or list(range(len(self.in_flight)))

    def least_loaded(self, engines: Sequence[int]) -> int:
        """The engine with the fewest requests in flight; equal ones in turn."""
        self._turn += 1
        return min(engines, key=lambda n: (self.in_flight[n], (n + self._turn) % len(self.in_flight)))

    def weighted(self, weights: Mapping[int, float]) -> int:
        """Smooth weighted round robin over Deployments; replicas in turn."""
        engines: dict[int, list[int]] = {}
        for n in self.up():
            engines.setdefault(self.world.engines[n].deployment.slot, []).append(n)
        for slot in engines:
            self._credit[slot] = self._credit.get(slot, 0.0) + weights[slot]
        chosen = max(engines, key=lambda slot: (self._credit[slot], -slot))
        self._credit[chosen] -= sum(weights[slot] for slot in engines)
        self._turns[chosen] = self._turns.get(chosen, -1) + 1
        return engines[chosen][self._turns[chosen] % len(engines[chosen])]
