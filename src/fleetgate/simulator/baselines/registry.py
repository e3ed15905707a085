"""The built-in comparisons by name: balancers without knowledge of capacity, with a configured one, and an oracle.

All but the oracle have no admission: they send every request at once, as proxies that only count requests do.
"""

from collections.abc import Callable

from fleetgate.simulator.baselines.base import BaselineBalancer, BaselineInputs
from fleetgate.simulator.baselines.least_outstanding import LeastOutstanding, NearestFirst, RegionLocal
from fleetgate.simulator.baselines.oracle import Oracle, OracleNoShed
from fleetgate.simulator.baselines.round_robin import GpuCountWeights, RoundRobin, StaticWeights
from fleetgate.simulator.serving.world import World

BASELINES: dict[str, Callable[[World, BaselineInputs], BaselineBalancer]] = {
    "round_robin": RoundRobin,
    "gpu_count_weights": GpuCountWeights,
    "least_outstanding": LeastOutstanding,
    "static_weights": StaticWeights,
    "region_local": RegionLocal,
    "nearest_first": NearestFirst,
    "clairvoyant": Oracle,
    "clairvoyant_no_shed": OracleNoShed,
}
