"""Simulated fleets: engines of different speed, faults, regions, prices, and the scores of runs."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetgate.core.model import Price
from fleetgate.core.routing import strategies
from fleetgate.simulator.baselines.base import BaselineInputs
from fleetgate.simulator.baselines.registry import BASELINES
from fleetgate.simulator.baselines.round_robin import RoundRobin
from fleetgate.simulator.faults import BadFault, parse_fault
from fleetgate.simulator.fleet import BadFleet, UnclearGateway, engines_of, fleet_of
from fleetgate.simulator.region_phases import BadPhase, load_at, parse_phases
from fleetgate.simulator.region_rtt import RegionRtts
from fleetgate.simulator.report.score import jain, slo_met
from fleetgate.simulator.serving.world import Arrival, Balancer, UnfinishedRequest, World
from fleetgate.simulator.trace_capacity import inside_share
from tests.scenarios.paper_fleets import FAST, SLOW, deployment, fleet, run, simulation, snapshot_of, trace

UNLIKE = fleet(deployment("big", FAST, 2), deployment("small", SLOW, 2))
TRACE = trace(1500)


def test_round_robin_over_unlike_engines_is_worse_than_weights_that_were_measured() -> None:
    blind = run(UNLIKE, TRACE, "round_robin", load=0.7).score
    measured = run(UNLIKE, TRACE, "static_weights", load=0.7).score
    assert measured.goodput_ratio > 1.2 * blind.goodput_ratio
    assert measured.goodput_ratio > 0.65


def test_the_oracle_does_no_worse_than_any_baseline_and_sheds_in_overload() -> None:
    ratios = {name: run(UNLIKE, TRACE, name, load=1.2).score for name in BASELINES}
    best = max(ratios.values(), key=lambda score: score.goodput_ratio)
    assert best.strategy == "clairvoyant"
    assert best.goodput_ratio > 0.9
    assert best.shed_share > 0.0
    served_late = (1.0 - best.shed_share) - min(best.slo_tpot_share, best.slo_ttft_share)
    assert served_late < 0.01  # it serves in time what it admits


@pytest.mark.parametrize("strategy", [*BASELINES, *strategies.names()])
def test_a_run_is_the_same_every_time(strategy: str) -> None:
    arrivals = trace(200, regions=("us-east", "eu-west"))
    on = fleet(deployment("a", FAST), deployment("b", SLOW, 2, "eu-west"))
    faults = (parse_fault("slow:a@20+30x2"), parse_fault("down:eu-west@60+5"))
    first, second = (run(on, arrivals, strategy, load=0.8, faults=faults, proxies=3).score for _ in range(2))
    assert first == second


def test_capacity_is_the_largest_rate_inside_the_slo() -> None:
    alone = fleet(deployment("a", FAST))
    rps = simulation(alone, TRACE, load=1.0).capacities["a"]
    shapes = [(arrival, 2.0 + 0.35 * arrival.prompt_tokens / 1000) for arrival in TRACE]
    assert inside_share(FAST, alone.slo, shapes, 0.97 * rps) >= 0.95
    assert inside_share(FAST, alone.slo, shapes, 1.06 * rps) < 0.95
    doubled = simulation(fleet(deployment("a", FAST, 2)), TRACE, load=1.0).capacities["a"]
    assert doubled == pytest.approx(2 * rps)


@settings(max_examples=20)
@given(st.floats(0.2, 2.0))
def test_load_sets_the_work_that_is_offered(load: float) -> None:
    simulated = simulation(UNLIKE, TRACE[:200], load=load)
    offered = sum(simulated.work) / simulated.trace[-1].at_s
    assert offered == pytest.approx(load * simulated.capacity_rps)
    assert simulated.load == pytest.approx(load, abs=1e-4)


def test_rate_sets_requests_a_second_and_neither_keeps_the_times() -> None:
    assert len(TRACE) / simulation(UNLIKE, TRACE, rate_rps=3.0).trace[-1].at_s == pytest.approx(3.0)
    kept = simulation(UNLIKE, TRACE).trace
    assert all(
        before.at_s - TRACE[0].at_s == pytest.approx(after.at_s) for before, after in zip(TRACE, kept, strict=True)
    )


def during(arrivals: list[Arrival], begin_s: float, end_s: float) -> list[Arrival]:
    return [arrival for arrival in arrivals if begin_s <= arrival.at_s < end_s]


def test_a_silent_slow_down_makes_tokens_slow_for_as_long_as_it_lasts() -> None:
    outcome = run(
        fleet(deployment("a", FAST)), TRACE, "round_robin", rate_rps=1.0, faults=(parse_fault("slow:a@300+300x4"),)
    )

    def tpot_s(begin_s: float, end_s: float) -> float:
        paces = [
            (arrival.ended_s - arrival.first_s) / (arrival.output_tokens - 1)
            for arrival in during(list(outcome.arrivals), begin_s, end_s)
            if arrival.output_tokens > 1
        ]
        return sum(paces) / len(paces)

    assert tpot_s(320, 580) > 3.5 * tpot_s(0, 280)
    assert tpot_s(700, 1400) < 1.2 * tpot_s(0, 280)


def test_a_region_that_dies_loses_its_requests_and_gets_none_until_it_is_up() -> None:
    on = fleet(deployment("here", FAST), deployment("there", FAST, 1, "eu-west"))
    dead = (parse_fault("down:eu-west@300+300"),)
    outcome = run(on, TRACE, "least_outstanding", rate_rps=2.0, faults=dead)
    assert {arrival.replica for arrival in during(list(outcome.arrivals), 301, 599)} == {0}
    assert {arrival.replica for arrival in during(list(outcome.arrivals), 601, 900)} == {0, 1}
    lost = [arrival for arrival in outcome.arrivals if arrival.refused]
    assert all(arrival.at_s < 300 and arrival.first_s > 0 for arrival in lost)  # the others moved before their commit
    local = run(on, trace(600, regions=("eu-west",)), "region_local", rate_rps=2.0, faults=dead)
    assert local.score.shed_share > run(on, TRACE[:600], "nearest_first", rate_rps=2.0, faults=dead).score.shed_share


def test_a_deployment_that_refuses_serves_nothing_new() -> None:
    on = fleet(deployment("a", FAST), deployment("b", FAST))
    outcome = run(on, TRACE, "round_robin", rate_rps=1.0, faults=(parse_fault("refuse:a@300+300"),))
    assert {arrival.replica for arrival in during(list(outcome.arrivals), 301, 599) if not arrival.refused} == {1}


def test_faults_that_overlap_multiply_and_end_one_by_one() -> None:
    faults = tuple(parse_fault(text) for text in ("slow:a@100+200x2", "slow:a@200+200x3"))
    outcome = run(
        fleet(deployment("a", FAST)), [Arrival(n, 50.0 * n, 100, 101) for n in range(10)], "round_robin", faults=faults
    )
    paces = {
        round(a.at_s): (a.ended_s - a.first_s) / 100 / (FAST.base_s + FAST.per_sequence_s) for a in outcome.arrivals
    }
    assert [round(paces[at_s]) for at_s in (50, 150, 250, 350, 450)] == [1, 2, 6, 3, 1]


@pytest.mark.parametrize(
    "text", ["", "slow", "slow:a", "slow:a@5", "down:a@5x3", "burn:a@5", "slow:a@x3", "slow:a@1.2.3x3", "slow:a@5x0"]
)
def test_a_malformed_fault_shows_the_form(text: str) -> None:
    with pytest.raises(BadFault, match="--fault"):
        parse_fault(text)


def test_a_fault_must_match_a_deployment() -> None:
    with pytest.raises(BadFault, match="big, small"):
        run(UNLIKE, TRACE[:5], "round_robin", faults=(parse_fault("slow:us-east@1x2"),))


def test_the_far_region_costs_its_round_trip() -> None:
    far = fleet(deployment("a", FAST, 1, "eu-west"))
    arrivals = [Arrival(n, 30.0 * n, 1600, 3, region="us-east") for n in range(5)]
    outcome = run(far, arrivals, "round_robin")
    rtt_s = RegionRtts(warn=lambda sentence: None).between_s("us-east", "eu-west")
    assert 0.05 < rtt_s < 0.2
    for arrival in outcome.arrivals:
        assert arrival.first_s - arrival.at_s == pytest.approx(1600 / FAST.prefill_tokens_per_s + rtt_s)
        assert (arrival.ended_s - arrival.first_s) / 2 == pytest.approx(FAST.base_s + FAST.per_sequence_s)


def test_round_trips_know_the_names_of_clouds_and_warn_once_about_others() -> None:
    warned: list[str] = []
    rtts = RegionRtts(warned.append)
    names = [
        "us-east-1",
        "us-east4",
        "eastus",
        "us-east",
        "eu-west-1",
        "europe-west4",
        "ap-south",
        "eu-north1",
        "us-south-1",
    ]
    assert all(rtts.between_s(one, "ap-northeast-1") > 0.05 for one in names)
    assert rtts.between_s("us-east-1", "us-east-1") == 0.0
    assert rtts.between_s("us-east", "eu-west") == rtts.between_s("eu-west", "us-east")
    assert not warned
    assert rtts.between_s("mars-1", "us-east") == rtts.between_s("us-east", "mars-1") == 0.0
    assert len(warned) == 1 and "mars-1" in warned[0]


def test_requests_come_from_where_it_is_day() -> None:
    phases = {"us-east": 0.0, "ap-northeast": 12.0}
    on = fleet(deployment("a", FAST, 1, "us-east-1"))
    arrivals = simulation(on, trace(6000), phases=phases).trace
    assert {arrival.region for arrival in arrivals} == {"us-east-1", "ap-northeast"}  # as the Deployment spells it
    night = [arrival.region for arrival in arrivals if 7 <= 24 * arrival.at_s / arrivals[-1].at_s < 9]
    evening = [arrival.region for arrival in arrivals if 19 <= 24 * arrival.at_s / arrivals[-1].at_s < 21]
    assert night.count("us-east-1") < 0.48 * len(night) < 0.52 * len(evening) < evening.count("us-east-1")
    assert parse_phases("us-east=0, eu-west=8.5") == {"us-east": 0.0, "eu-west": 8.5}
    for wrong in ("us-east", "us-east=noon", "=3"):
        with pytest.raises(BadPhase, match="us-east=0,eu-west=8"):
            parse_phases(wrong)


@given(st.floats(0, 48))
def test_the_day_has_no_jumps_and_repeats(hour: float) -> None:
    assert load_at(hour) == pytest.approx(load_at(hour + 24.0))
    assert abs(load_at(hour) - load_at(hour + 0.01)) < 0.01


def test_requests_go_to_the_proxies_of_their_region() -> None:
    on = fleet(deployment("a", FAST), deployment("b", FAST, 1, "eu-west"))
    arrivals = trace(300, regions=("us-east", "eu-west"))
    four = simulation(on, arrivals, proxies=4)
    assert four.proxy_regions == ["eu-west", "us-east", "eu-west", "us-east"]
    used: dict[str, set[int]] = {}
    for arrival in four.trace:
        used.setdefault(arrival.region, set()).add(arrival.proxy)
    assert used == {"eu-west": {0, 2}, "us-east": {1, 3}}
    assert simulation(on, trace(5)).proxy_regions == ["us-east"]


def test_cost_counts_hourly_prices_and_token_prices() -> None:
    arrivals = [Arrival(n, 36.0 * n, 1000, 100) for n in range(101)]  # an hour
    hourly = fleet(deployment("a", FAST, price=Price(usd_per_hour=22.22)))
    tokens = 101 * 1100
    assert run(hourly, arrivals, "round_robin").score.cost_usd_per_mtok == pytest.approx(22.22 / tokens * 1e6, rel=1e-3)
    by_token = fleet(deployment("a", FAST, price=Price(usd_per_mtok_input=0.5, usd_per_mtok_output=2.0)))
    assert run(by_token, arrivals, "round_robin").score.cost_usd_per_mtok == pytest.approx((500 + 200) / 1100, rel=1e-3)
    assert run(fleet(deployment("a", FAST)), arrivals, "round_robin").score.cost_usd_per_mtok is None


def test_spill_counts_the_lower_ranks_and_among_equals_the_other_regions() -> None:
    both = (deployment("a", FAST), deployment("b", FAST, 1, "eu-west"))
    arrivals = trace(200, regions=("us-east",))
    assert run(fleet(*both, ranked=True), arrivals, "round_robin", load=0.3).score.spill_ratio == pytest.approx(0.5)
    assert run(fleet(*both), arrivals, "round_robin", load=0.3).score.spill_ratio == pytest.approx(0.5)
    assert run(fleet(*both), arrivals, "region_local", load=0.3).score.spill_ratio == 0.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1))
def test_jain_is_one_for_equal_shares_and_never_more(fates: list[tuple[str, bool]]) -> None:
    arrivals = [Arrival(n, 0.0, 1, 1, key=key) for n, (key, _) in enumerate(fates)]
    index = jain(arrivals, [(inside, inside) for _, inside in fates], [1.0] * len(fates))
    assert 0.0 <= index <= 1.0 + 1e-9
    assert jain(arrivals, [(True, True)] * len(fates), [2.0] * len(fates)) == pytest.approx(1.0)


def test_both_targets_of_the_slo_are_checked() -> None:
    def verdict(first_s: float, ended_s: float, output_tokens: int = 11) -> tuple[bool, bool]:
        return slo_met(Arrival(0, 10.0, 1000, output_tokens, first_s=first_s, ended_s=ended_s), UNLIKE)

    assert verdict(12.34, 13.13) == (True, True)
    assert verdict(12.36, 13.15) == (False, True)
    assert verdict(12.34, 13.15) == (True, False)
    assert verdict(12.34, 12.34, output_tokens=1) == (True, True)
    assert verdict(-1.0, -1.0) == (False, False)


def test_cached_prefixes_shorten_the_first_token() -> None:
    prompt = tuple(range(16))
    arrivals = [Arrival(n, 20.0 * n, 16 * 512, 2, blocks=prompt) for n in range(3)]
    outcome = run(fleet(deployment("a", FAST)), arrivals, "round_robin")
    ttfts_s = [arrival.first_s - arrival.at_s for arrival in outcome.arrivals]
    assert ttfts_s[0] == pytest.approx(16 * 512 / 16000)
    assert ttfts_s[1:] == pytest.approx([512 / 16000] * 2)


class DroppingBalancer:
    """A balancer that neither sends nor refuses, which would hang a simulation."""

    def on_arrival(self, arrival: Arrival, now_s: float) -> None: ...
    def on_first_token(self, arrival: Arrival, now_s: float) -> None: ...
    def on_finished(self, arrival: Arrival, now_s: float) -> None: ...
    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None: ...
    def on_tick(self, now_s: float) -> None: ...
    def on_wake(self, now_s: float) -> None: ...
    def limit_of(self, slot: int) -> int:
        return 0


def test_a_balancer_that_drops_a_request_is_an_error() -> None:
    world = World([], ["us-east"])
    dropping: Balancer = DroppingBalancer()
    world.balancer = dropping
    with pytest.raises(UnfinishedRequest, match="1 requests"):
        world.run([Arrival(0, 1.0, 10, 10)])


class OverLimit(RoundRobin):
    """A balancer that has a limit and ignores it."""

    def limit_of(self, slot: int) -> int:
        return 2


def test_over_commitment_is_what_is_in_flight_beyond_the_limit() -> None:
    on = fleet(deployment("a", FAST))
    for count, beyond in ((2, 0.0), (3, 0.5), (8, 3.0)):
        world = World(engines_of(on, ["us-east"], RegionRtts(warn=lambda sentence: None)), ["us-east"])
        world.balancer = OverLimit(world, BaselineInputs(on, {"a": 1.0}))
        world.run([Arrival(n, 0.0, 100, 50) for n in range(count)])
        assert world.overcommit_max == pytest.approx(beyond)


def test_an_incomplete_fleet_is_an_error() -> None:
    with pytest.raises(BadFleet, match="has no Profile"):
        fleet_of(snapshot_of(deployment("a", None)))
    with pytest.raises(UnclearGateway, match="the fleet has: chat"):
        fleet_of(snapshot_of(deployment("a", FAST)), "talk")
    slots = [endpoint.slot for known in UNLIKE.deployments for endpoint in known.endpoints]
    assert all(after == before + 1 for before, after in pairwise(slots))
