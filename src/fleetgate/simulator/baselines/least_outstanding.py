"""Least outstanding requests: over the whole fleet, inside a region, or at the nearest Deployment."""

from fleetgate.simulator.baselines.base import BaselineBalancer
from fleetgate.simulator.serving.world import Arrival


class LeastOutstanding(BaselineBalancer):
    """The replica with the fewest requests in flight."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The least loaded engine of the fleet."""
        return self.least_loaded(self.up())


class RegionLocal(BaselineBalancer):
    """Only the request's own region, whatever its load; the nearest Deployment if that region has none."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The least loaded engine of the region."""
        engines = self.world.engines
        home = arrival.region or self.world.proxy_regions[arrival.proxy]
        local = [n for n in range(len(engines)) if engines[n].deployment.region == home]
        return self.least_loaded(local) if local else self._nearest(arrival)

    def _nearest(self, arrival: Arrival) -> int:
        engines, up = self.world.engines, self.up()
        nearest_s = min(engines[n].rtts_s[arrival.proxy] for n in up)
        return self.least_loaded([n for n in up if engines[n].rtts_s[arrival.proxy] == nearest_s])


class NearestFirst(RegionLocal):
    """The nearest Deployment that is up, without regard to capacity, as geographic DNS does."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The least loaded engine of the nearest Deployment."""
        return self._nearest(arrival)
