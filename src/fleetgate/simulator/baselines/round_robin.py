"""Weighted round robin over Deployments, with three kinds of weights."""

from fleetgate.simulator.baselines.base import BaselineBalancer
from fleetgate.simulator.serving.world import Arrival


class RoundRobin(BaselineBalancer):
    """Deployments in turn, then their replicas."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """The next engine in turn."""
        return self.weighted(dict.fromkeys(self.weights, 1.0))


class GpuCountWeights(BaselineBalancer):
    """Weights by the number of GPUs, which treats an L4 like an H100."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Smooth weighted round robin by the number of GPUs."""
        deployments = self.fleet.deployments
        return self.weighted({d.slot: float(max(1, d.accelerators) * len(d.endpoints)) for d in deployments})


class StaticWeights(BaselineBalancer):
    """Weights by measured capacity, configured once."""

    def choose(self, arrival: Arrival, now_s: float) -> int:
        """Smooth weighted round robin by measured capacity."""
        return self.weighted(self.weights)
