"""What others do, to compare with: balancers that know no capacity, or a typed one, and one that knows the truth.

But for the last they have no admission: whatever comes is sent at once, as proxies do that only look at counts.
"""

from collections.abc import Callable

from fleetgate.simulator.baseline import Baseline, TrueLoad
from fleetgate.simulator.oracle import Oracle, OracleNoShed
from fleetgate.simulator.world import Arrival, World


class RoundRobin(Baseline):
    """Deployments in turn, then their replicas."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The next one."""
        return self.weighted(dict.fromkeys(self.weights, 1.0))


class GpuCountWeights(Baseline):
    """Weights by the number of GPUs, which takes an L4 for an H100."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Smooth weighted round robin."""
        deployments = self.fleet.deployments
        return self.weighted({d.slot: float(max(1, d.accelerators) * len(d.endpoints)) for d in deployments})


class StaticWeights(Baseline):
    """Weights by measured capacity, typed in once."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Smooth weighted round robin."""
        return self.weighted(self.weights)


class LeastOutstanding(Baseline):
    """The replica with the fewest requests in flight."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Counts alone."""
        return self.least(self.up())


class RegionLocal(Baseline):
    """Only the request's own region, whatever the load; the nearest one where it has no Deployment."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Least outstanding inside the region."""
        engines = self.world.engines
        home = arrival.region or self.world.proxy_regions[arrival.proxy]
        local = [n for n in range(len(engines)) if engines[n].deployment.region == home]
        return self.least(local) if local else self._nearest(arrival)

    def _nearest(self, arrival: Arrival) -> int:
        engines, up = self.world.engines, self.up()
        nearest_s = min(engines[n].rtts_s[arrival.proxy] for n in up)
        return self.least([n for n in up if engines[n].rtts_s[arrival.proxy] == nearest_s])


class NearestFirst(RegionLocal):
    """The nearest Deployment that is up, without regard to capacity, as geographic DNS does."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Least outstanding inside the nearest."""
        return self._nearest(arrival)


BASELINES: dict[str, Callable[[World, TrueLoad], Baseline]] = {
    "round_robin": RoundRobin,
    "gpu_count_weights": GpuCountWeights,
    "least_outstanding": LeastOutstanding,
    "static_weights": StaticWeights,
    "region_local": RegionLocal,
    "nearest_first": NearestFirst,
    "clairvoyant": Oracle,
    "clairvoyant_no_shed": OracleNoShed,
}
