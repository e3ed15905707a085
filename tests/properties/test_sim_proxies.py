"""The production balancer in the simulator: its ledger ends at zero, its limits hold, each request ends once."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fleetgate.core.routing import strategies
from fleetgate.simulator.faults import SimulatedFault, schedule_faults
from fleetgate.simulator.fleet import SimulatedFleet, engines_of
from fleetgate.simulator.proxy_model import ProxyFleet
from fleetgate.simulator.region_rtt import RegionRtts
from fleetgate.simulator.serving.world import Arrival, World
from tests.scenarios.paper_fleets import SLOW, deployment, fleet

FOREVER = float("inf")


class CheckingWorld(World):
    """Counts results, and checks lease and ledger for every request sent."""

    def __init__(self, on: SimulatedFleet, regions: Sequence[str]) -> None:
        super().__init__(engines_of(on, regions, RegionRtts(warn=lambda sentence: None)), regions)
        self.refusals: Counter[int] = Counter()
        self.sent = 0
        self.fleet: ProxyFleet

    def refuse(self, arrival: Arrival, reason: str, now_s: float) -> None:
        self.refusals[arrival.index] += 1
        super().refuse(arrival, reason, now_s)

    def send(self, arrival: Arrival, engine: int, now_s: float) -> None:
        self.sent += 1
        proxy, slot = self.fleet.proxies[arrival.proxy], self.engines[engine].deployment.slot
        assert self.fleet.leases[arrival.proxy, slot].until_s >= now_s
        assert 0 < proxy.work_ledger.ledger.in_flight(slot) <= proxy.views[slot].limit
        super().send(arrival, engine, now_s)


def crowd(count: int, gap_s: float, prompt_tokens: int, proxies: int) -> list[Arrival]:
    """More requests than the fleet can serve, so that many wait."""
    return [Arrival(n, n * gap_s, prompt_tokens, 20, region="us-east", proxy=n % proxies) for n in range(count)]


crowds = st.builds(
    crowd,
    count=st.integers(1, 120),
    gap_s=st.sampled_from([0.0, 0.004, 0.05]),
    prompt_tokens=st.sampled_from([10, 600, 5000]),
    proxies=st.just(2),
)
faults = st.builds(
    SimulatedFault,
    kind=st.sampled_from(["slow", "down", "refuse"]),
    name=st.sampled_from(["a", "b"]),
    begins_s=st.sampled_from([0.0, 0.3, 1.02, 2.5]),
    ends_s=st.sampled_from([FOREVER, 4.7]),
    factor=st.just(3.0),
)
REFUSED_WHILE_MANY_WAIT = [
    SimulatedFault("refuse", "a", 1.02, FOREVER, 1.0),
    SimulatedFault("refuse", "b", 1.02, FOREVER, 1.0),
]


@settings(max_examples=60)
@given(st.sampled_from(strategies.names()), crowds, st.lists(faults, max_size=3))
@example("overflow", crowd(60, 0.004, 600, 2), REFUSED_WHILE_MANY_WAIT)
@example("overflow", crowd(60, 0.004, 600, 2), [SimulatedFault("down", "a", 1.02, FOREVER, 1.0)])
def test_the_ledger_ends_at_zero_limits_hold_and_each_request_ends_once(
    strategy: str, requests: list[Arrival], scheduled: list[SimulatedFault]
) -> None:
    # Without round trips a request may fail at the time at which it is sent.
    on, regions = fleet(deployment("a", SLOW), deployment("b", SLOW)), ("us-east", "us-east")
    world = CheckingWorld(on, regions)
    world.balancer = world.fleet = ProxyFleet(world, on, strategy)
    schedule_faults(scheduled, on, world)
    world.run(requests)
    ended = Counter(arrival.index for arrival in requests if arrival.ended_s >= 0.0)
    assert ended + world.refusals == Counter(range(len(requests)))
    if not scheduled:
        assert world.sent == len(ended)
    for proxy in world.fleet.proxies:
        assert not proxy.open and not proxy.waiting and not proxy.scheduler.queue
        assert all(proxy.work_ledger.ledger.in_flight(known.slot) == 0 for known in on.deployments)
        assert all(proxy.work_ledger.sequences(slot) == 0 for slot in range(len(world.engines)))
