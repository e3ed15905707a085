"""Every strategy in the folder, a dropped-in one included, keeps what routing relies on."""

import copy
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.routing import strategies
from fleetgate.core.routing.route import Decision, ModelRoute, route
from fleetgate.core.routing.strategies import NO_TURN, Candidate, CandidateState, Ranking, Strategy, Turn
from tests.properties.test_routing import has_place, situations

Situation = tuple[tuple[Candidate, ...], dict[int, CandidateState], Turn]


def fit_of(situation: Situation) -> list[Candidate]:
    """The candidates that `route` gives to a strategy: up, and with capacity."""
    made, load, _ = situation
    return [c for c in made if has_place(load[c.slot])]


def check_answer(strategy: Strategy, situation: Situation) -> None:
    """An order of candidates it was given, each once, and none when there is none to give."""
    _, load, turn = situation
    fit = fit_of(situation)
    if not fit:
        return
    given_turn, given_load = dict(turn), copy.deepcopy(load)
    ranking = strategy(fit, load, turn)
    assert isinstance(ranking, Ranking)
    names = [candidate.name for candidate in ranking.order]
    assert names, "a candidate has capacity, so one must be named"
    assert len(set(names)) == len(names) and set(names) <= {candidate.name for candidate in fit}
    assert dict(turn) == given_turn and load == given_load, "what is given is not edited"
    again = strategy(fit, load, turn)
    assert [c.name for c in again.order] == names and again.turn == ranking.turn, "the same inputs, the same answer"


def check_order_of_writing(strategy: Strategy, situation: Situation) -> None:
    """The candidates named do not depend on the order in which the Deployments were written."""
    made, load, turn = situation
    forward, backward = ModelRoute(made, strategy), ModelRoute(tuple(reversed(made)), strategy)
    one, other = route(forward, load, turn), route(backward, load, turn)
    assert type(one) is type(other)
    if isinstance(one, Decision) and isinstance(other, Decision):
        assert {c.name for c in one.order} == {c.name for c in other.order}


def check_long_run(strategy: Strategy, made: tuple[Candidate, ...]) -> None:
    """A thousand picks on idle Deployments: each may be left out, none gets more than its limit, `turn` stays small."""
    turn: Turn = NO_TURN
    in_flight = {candidate.slot: 0 for candidate in made}
    for step in range(1000):
        load = {c.slot: CandidateState(in_flight[c.slot], 1.0, c.limit, c.slot + 1.0) for c in made}
        decision = route(ModelRoute(made, strategy), load, turn)
        if isinstance(decision, Decision):
            turn = decision.turn
            first = decision.order[0]
            assert not first.limit or in_flight[first.slot] < first.limit
            in_flight[first.slot] += 1
        if step % 3 == 2:
            busiest = max(in_flight, key=lambda slot: in_flight[slot])
            in_flight[busiest] -= 1
    assert len(turn) <= len(made) and all(abs(value) < 1e6 for value in turn.values())


@pytest.mark.parametrize("name", strategies.names())
class TestEveryStrategy:
    """The suite that a new file must pass; nothing else names it."""

    @given(situation=situations())
    def test_it_orders_what_it_is_given(self, name: str, situation: Situation) -> None:
        check_answer(strategies.find(name), situation)

    @given(situation=situations())
    def test_it_does_not_depend_on_the_order_of_writing(self, name: str, situation: Situation) -> None:
        check_order_of_writing(strategies.find(name), situation)

    @given(limits=st.lists(st.integers(0, 40), min_size=1, max_size=5))
    def test_it_holds_for_long(self, name: str, limits: list[int]) -> None:
        made = tuple(Candidate(name=f"d{n}", slot=n, limit=limit) for n, limit in enumerate(limits))
        check_long_run(strategies.find(name), made)

    def test_it_stands_extremes(self, name: str) -> None:
        made = (
            Candidate(name="tiny", slot=0, limit=1),
            Candidate(name="vast", slot=1, limit=1_000_000),
            Candidate(name="open", slot=2),
        )
        load = {
            0: CandidateState(0, 0.001, 1, 1e-9),
            1: CandidateState(999_999, 1.0, 1_000_000, 1e9),
            2: CandidateState(10**9, 1.0),
        }
        check_answer(strategies.find(name), (made, load, {}))

    def test_it_is_one_pure_documented_function(self, name: str) -> None:
        strategy = strategies.find(name)
        assert inspect.getdoc(strategy)
        module = inspect.getmodule(strategy)
        assert module is not None and inspect.getdoc(module)
        assert list(inspect.signature(strategy).parameters) == ["candidates", "load", "turn"]
        source = inspect.getsource(module)
        assert not any(f"import {word}" in source for word in ("random", "time", "os", "asyncio"))


def test_an_unknown_strategy_is_a_clear_error() -> None:
    with pytest.raises(KeyError, match="overflow"):
        strategies.find("dice")


@pytest.mark.parametrize(("late", "delays"), [("", False), ("", True), ("ttft", False)])
def test_installed_strategies_still_read_the_prediction_by_its_old_names(late: str, delays: bool) -> None:
    slow = LatencyPrediction(3, ttft_s=3.1, tpot_s=0.02, prefill_s=3.0, late=late, delays_others=delays)
    state = CandidateState(0, 1.0, predicted=slow)
    assert state.fit is slow and slow.tight is delays
    assert state.unwelcome is state.harms_slo is bool(late or delays)
