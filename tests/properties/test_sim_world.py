"""The simulated world: for every balancer and fault, each request ends once and no state is left over."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.routing import strategies
from fleetgate.simulator.baselines.base import BaselineInputs
from fleetgate.simulator.baselines.registry import BASELINES
from fleetgate.simulator.faults import SimulatedFault, schedule_faults
from fleetgate.simulator.fleet import SimulatedFleet, engines_of
from fleetgate.simulator.proxy_model import ProxyFleet
from fleetgate.simulator.region_rtt import RegionRtts
from fleetgate.simulator.serving.world import Arrival, Balancer, World
from tests.scenarios.paper_fleets import FAST, SLOW, deployment, fleet

REGIONS = ("us-east", "eu-west")


class CountingBalancer:
    """Counts its calls and passes them to another balancer."""

    def __init__(self, inner: Balancer) -> None:
        self.inner = inner
        self.arrivals: Counter[int] = Counter()
        self.firsts: Counter[int] = Counter()
        self.ends: Counter[int] = Counter()
        self.failures: Counter[int] = Counter()

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        assert now_s == arrival.at_s
        self.arrivals[arrival.index] += 1
        self.inner.on_arrival(arrival, now_s)

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        self.firsts[arrival.index] += 1
        self.inner.on_first_token(arrival, now_s)

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        self.ends[arrival.index] += 1
        self.inner.on_finished(arrival, now_s)

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        assert failure in ("full", "broken")
        self.failures[arrival.index] += 1
        self.inner.on_failed(arrival, failure, now_s)

    def on_tick(self, now_s: float) -> None:
        self.inner.on_tick(now_s)

    def on_wake(self, now_s: float) -> None:
        self.inner.on_wake(now_s)

    def limit_of(self, slot: int) -> int:
        return self.inner.limit_of(slot)


def balancer(strategy: str, world: World, on: SimulatedFleet) -> Balancer:
    if strategy in BASELINES:
        return BASELINES[strategy](world, BaselineInputs(on, {d.name: 1.0 + d.slot for d in on.deployments}))
    return ProxyFleet(world, on, strategy)


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    gaps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.5, 3.0]), min_size=1, max_size=30))
    found, at_s = [], 0.0
    for index, gap_s in enumerate(gaps):
        at_s += gap_s
        found.append(
            Arrival(
                index,
                at_s,
                draw(st.one_of(st.integers(1, 2000), st.integers(1, 40_000))),
                draw(st.integers(1, 300)),
                region=draw(st.sampled_from(REGIONS)),
                proxy=draw(st.integers(0, 1)),
            )
        )
    return found


faults = st.builds(
    SimulatedFault,
    kind=st.sampled_from(["slow", "down", "refuse"]),
    name=st.sampled_from(["a", "b", "c"]),
    begins_s=st.floats(0.0, 20.0),
    ends_s=st.one_of(st.just(float("inf")), st.floats(20.0, 40.0)),
    factor=st.sampled_from([0.5, 3.0]),
)


@given(st.sampled_from(sorted([*BASELINES, *strategies.names()])), arrivals(), st.lists(faults, max_size=3))
def test_every_request_ends_exactly_once(
    strategy: str, requests: list[Arrival], scheduled: list[SimulatedFault]
) -> None:
    on = fleet(deployment("a", FAST), deployment("b", SLOW, 2, "eu-west"), deployment("c", SLOW, region="eu-west"))
    world = World(engines_of(on, REGIONS, RegionRtts(warn=lambda sentence: None)), REGIONS)
    world.balancer = counting = CountingBalancer(balancer(strategy, world, on))
    schedule_faults(scheduled, on, world)
    world.run(requests)
    all_requests = Counter(dict.fromkeys(range(len(requests)), 1))
    refused = Counter(arrival.index for arrival in requests if arrival.refused)
    assert counting.arrivals == all_requests
    assert counting.ends + refused == all_requests
    for arrival in requests:
        assert counting.firsts[arrival.index] <= 1
        if not arrival.refused:
            assert arrival.at_s <= arrival.first_s <= arrival.ended_s
            assert counting.firsts[arrival.index] == 1
        if not scheduled:
            assert not counting.failures[arrival.index]
    assert set(world.in_flight.values()) == {0}
    assert all(not engine.jobs and not engine.replica.kv_used for engine in world.engines)


@given(arrivals())
def test_nothing_is_faster_than_an_idle_engine_and_the_network(requests: list[Arrival]) -> None:
    on = fleet(deployment("a", FAST), deployment("c", SLOW, region="eu-west"))
    world = World(engines_of(on, REGIONS, RegionRtts(warn=lambda sentence: None)), REGIONS)
    world.balancer = balancer("round_robin", world, on)
    world.run(requests)
    for arrival in requests:
        engine = world.engines[arrival.replica]
        profile, rtt_s = engine.replica.profile, engine.rtts_s[arrival.proxy]
        least_s = rtt_s + arrival.prompt_tokens / profile.prefill_tokens_per_s
        assert arrival.first_s - arrival.at_s >= least_s - 1e-9
        steps = arrival.output_tokens - 1
        assert arrival.ended_s - arrival.first_s >= steps * (profile.base_s + profile.per_sequence_s) - 1e-9
