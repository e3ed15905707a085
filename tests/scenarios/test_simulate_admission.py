"""The gain by admission in overload, the cost of several proxies, and what the death of a region must not lose."""

import msgspec
import pytest

from fleetgate.simulator import proxy_model
from fleetgate.simulator.faults import parse_fault
from fleetgate.simulator.serving.world import Arrival
from tests.scenarios.paper_fleets import FAST, SLOW, deployment, fleet, run, trace

OURS = "capacity_round_robin"
UNLIKE = fleet(deployment("big", FAST), deployment("small", SLOW, 3))


def disable_admission(patch: pytest.MonkeyPatch) -> None:
    """Remove limits and predictions; strategy and learning stay as they are."""
    refresh_views = proxy_model.ProxyModel.refresh_views

    def refresh_without_limits(self: proxy_model.ProxyModel, now_s: float) -> None:
        refresh_views(self, now_s)
        for slot, view in self.views.items():
            self.views[slot] = msgspec.structs.replace(view, limit=0, current_profile=None)

    patch.setattr(proxy_model.ProxyModel, "refresh_views", refresh_without_limits)


@pytest.mark.parametrize("seed", [1, 2])
def test_in_overload_admission_raises_goodput_by_half(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = trace(1500, seed)
    ours = run(UNLIKE, arrivals, OURS, load=1.2).score
    least_outstanding = run(UNLIKE, arrivals, "least_outstanding", load=1.2).score
    assert ours.goodput_ratio >= 0.95
    assert ours.goodput_ratio >= 1.5 * least_outstanding.goodput_ratio
    disable_admission(monkeypatch)
    without_admission = run(UNLIKE, arrivals, OURS, load=1.2).score
    assert without_admission.shed_share == 0.0
    assert ours.goodput_ratio >= 1.5 * without_admission.goodput_ratio


def test_four_proxies_reach_nearly_the_goodput_of_one_and_admit_no_more() -> None:
    on = fleet(deployment("big", FAST, 2), deployment("small", SLOW, 2))
    arrivals = trace(1500)
    one, four = (run(on, arrivals, OURS, load=1.2, proxies=count).score for count in (1, 4))
    assert four.goodput_ratio >= 0.9 * one.goodput_ratio
    assert four.overcommit_max <= 0.02


@pytest.mark.parametrize("strategy", [OURS, "overflow", "least_cost"])
def test_a_region_that_dies_loses_only_responses_that_had_begun(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Arrival] = []
    original = proxy_model.ProxyModel.on_failed

    def on_failed(self: proxy_model.ProxyModel, arrival: Arrival, failure: str, now_s: float) -> None:
        if arrival.first_s < 0.0:
            moved.append(arrival)
        original(self, arrival, failure, now_s)

    monkeypatch.setattr(proxy_model.ProxyModel, "on_failed", on_failed)
    on = fleet(deployment("here", FAST), deployment("there", FAST, 1, "eu-west"))
    arrivals = trace(1000, regions=("us-east", "eu-west"))
    # A fifth of the capacity of both regions, so that the remaining region can serve everything.
    died_s = 40.1  # just after the views were refreshed, so that requests are still sent there
    outcome = run(on, arrivals, strategy, load=0.2, faults=(parse_fault(f"down:eu-west@{died_s}"),))
    lost = [arrival for arrival in outcome.arrivals if arrival.refused]
    assert lost and moved
    assert all(arrival.refused == "interrupted" and 0.0 < arrival.first_s <= died_s + 0.2 for arrival in lost)
    assert all(arrival.ended_s >= 0.0 and arrival.replica == 0 for arrival in moved)
    assert {arrival.replica for arrival in outcome.arrivals if arrival.at_s > died_s} == {0}
