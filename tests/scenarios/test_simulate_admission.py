"""What admission by prediction is worth in overload, what several proxies cost, and what a dead region may not lose."""

import msgspec
import pytest

from fleetgate.simulator import proxy_model as shell
from fleetgate.simulator.faults import parse_fault
from fleetgate.simulator.world import Arrival
from tests.scenarios.paper_fleets import FAST, SLOW, deployment, fleet, run, trace

OURS = "capacity_round_robin"
UNLIKE = fleet(deployment("big", FAST), deployment("small", SLOW, 3))


def let_everybody_in(patch: pytest.MonkeyPatch) -> None:
    """Admission off: no limit and no forecast, while strategy, learning and everything else go on."""
    renew = shell.ProxyModel.renew

    def renew_without(self: shell.ProxyModel, now_s: float) -> None:
        renew(self, now_s)
        for slot, outlook in self.outlooks.items():
            self.outlooks[slot] = msgspec.structs.replace(outlook, limit=0, current_profile=None)

    patch.setattr(shell.ProxyModel, "renew", renew_without)


@pytest.mark.parametrize("seed", [1, 2])
def test_in_overload_admission_is_worth_half_as_much_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = trace(1500, seed)
    ours = run(UNLIKE, arrivals, OURS, load=1.2).score
    counting = run(UNLIKE, arrivals, "least_outstanding", load=1.2).score
    assert ours.goodput_ratio >= 0.95
    assert ours.goodput_ratio >= 1.5 * counting.goodput_ratio
    let_everybody_in(monkeypatch)
    ungated = run(UNLIKE, arrivals, OURS, load=1.2).score
    assert ungated.shed_share == 0.0
    assert ours.goodput_ratio >= 1.5 * ungated.goodput_ratio


def test_four_proxies_do_nearly_as_well_as_one_and_admit_no_more() -> None:
    on = fleet(deployment("big", FAST, 2), deployment("small", SLOW, 2))
    arrivals = trace(1500)
    one, four = (run(on, arrivals, OURS, load=1.2, proxies=count).score for count in (1, 4))
    assert four.goodput_ratio >= 0.9 * one.goodput_ratio
    assert four.overcommit_max <= 0.02


@pytest.mark.parametrize("strategy", [OURS, "overflow", "least_cost"])
def test_a_region_that_dies_loses_only_answers_that_had_begun(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Arrival] = []
    failed = shell.ProxyModel.failed

    def watched(self: shell.ProxyModel, arrival: Arrival, failure: str, now_s: float) -> None:
        if arrival.first_s < 0.0:
            moved.append(arrival)
        failed(self, arrival, failure, now_s)

    monkeypatch.setattr(shell.ProxyModel, "failed", watched)
    on = fleet(deployment("here", FAST), deployment("there", FAST, 1, "eu-west"))
    arrivals = trace(1000, regions=("us-east", "eu-west"))
    # A fifth of the load of both, so that the region that is left has room for all of it.
    died_s = 40.1  # just after a look at who is up, so that requests are still sent there
    outcome = run(on, arrivals, strategy, load=0.2, faults=(parse_fault(f"down:eu-west@{died_s}"),))
    lost = [arrival for arrival in outcome.arrivals if arrival.refused]
    assert lost and moved
    assert all(arrival.refused == "interrupted" and 0.0 < arrival.first_s <= died_s + 0.2 for arrival in lost)
    assert all(arrival.ended_s >= 0.0 and arrival.replica == 0 for arrival in moved)
    assert {arrival.replica for arrival in outcome.arrivals if arrival.at_s > died_s} == {0}
