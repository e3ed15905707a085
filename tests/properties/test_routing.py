"""Routing: who may be chosen, in what order, and that nothing but the state decides."""

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.capacity.units import spill_limit
from fleetgate.core.routing import strategies
from fleetgate.core.routing.route import Decision, ModelRoute, Rejection, RejectionReason, route
from fleetgate.core.routing.strategies import NO_TURN, Candidate, CandidateState, Load, Turn


@st.composite
def candidates(draw: st.DrawFn, size_min: int = 1) -> tuple[Candidate, ...]:
    """Deployments with ranks and limits as operators write them."""
    count = draw(st.integers(size_min, 8))
    made = []
    for slot in range(count):
        limit = draw(st.integers(0, 12))
        made.append(
            Candidate(
                name=f"d{slot}",
                slot=slot,
                rank=draw(st.integers(1, 3)),
                limit=limit,
                overflow_at=draw(st.sampled_from([0.5, 0.85, 1.0])),
                distance=draw(st.integers(0, 1)),
            )
        )
    return tuple(made)


@st.composite
def loads(draw: st.DrawFn, of: tuple[Candidate, ...]) -> Load:
    """Any load, over-full and unhealthy ones included."""
    health = st.sampled_from([0.0, 0.1, 0.5, 1.0])
    fits = st.none() | st.builds(
        LatencyPrediction,
        endpoint_slot=st.integers(0, 9),
        ttft_s=st.floats(0, 10),
        tpot_s=st.floats(0, 1),
        prefill_s=st.floats(0, 10),
        late=st.sampled_from(["", "", "", "TTFT", "TPOT"]),
        delays_others=st.booleans(),
    )
    units = st.sampled_from([0.5, 1.0, 3.0, 8.0])
    warm, usd = st.sampled_from([0.0, 0.0, 0.4, 1.0]), st.floats(0, 1)
    return {
        c.slot: CandidateState(
            draw(st.integers(0, 15)), draw(health), c.limit, draw(units), draw(fits), draw(warm), draw(usd)
        )
        for c in of
    }


def has_place(standing: CandidateState) -> bool:
    """Up and below its limit."""
    return standing.health > 0 and not (standing.limit and standing.in_flight >= standing.limit)


def has_room(standing: CandidateState) -> bool:
    """It has a place, and the request would keep its SLO there."""
    return has_place(standing) and not standing.late


def spills(candidate: Candidate, standing: CandidateState) -> bool:
    """Past the share of its limit at which `overflow` goes on to the next rank."""
    limit = spill_limit(standing.limit, candidate.overflow_at)
    return bool(limit) and standing.in_flight >= limit


@st.composite
def situations(draw: st.DrawFn) -> tuple[tuple[Candidate, ...], Load, Turn]:
    """Candidates, their load, and what the strategy remembers."""
    made = draw(candidates())
    turn = draw(st.dictionaries(st.integers(0, 7), st.floats(-1, 1), max_size=8))
    return made, draw(loads(made)), turn


def decide(name: str, made: tuple[Candidate, ...], load: Load, turn: Turn) -> Decision | Rejection:
    return route(ModelRoute(made, strategies.find(name)), load, turn)


every_strategy = st.sampled_from(strategies.names())


@given(every_strategy, situations())
def test_only_those_with_room_that_are_up_are_chosen(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    """The first has room, and the rest at least a place; a rejection has asked everybody."""
    made, load, turn = situation
    fit = {c.name for c in made if has_room(load[c.slot])}
    decision = decide(name, made, load, turn)
    excluded = {name for name, _ in decision.excluded}
    if isinstance(decision, Decision):
        chosen = [c.name for c in decision.order]
        assert len(set(chosen)) == len(chosen) and chosen[0] in fit
        assert set(chosen) <= {c.name for c in made if has_place(load[c.slot])}
        assert {c.name for c in made if not has_place(load[c.slot])} <= excluded <= {c.name for c in made} - fit
        assert not excluded & set(chosen)
    else:
        assert not fit and excluded == {c.name for c in made}


@given(every_strategy, situations())
def test_a_long_prompt_goes_where_it_holds_up_nobody_if_it_can(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    decision = decide(name, made, load, turn)
    welcome = {c.name for c in made if has_room(load[c.slot]) and not load[c.slot].harms_slo}
    if isinstance(decision, Decision) and welcome:
        assert decision.order[0].name in welcome


class Counting(CandidateState):
    """Counts how often its prediction is read."""

    asked: int = 0

    @property
    def prediction(self) -> LatencyPrediction | None:
        self.asked += 1
        return self.predicted


@given(st.sampled_from(["overflow", "capacity_round_robin"]), situations())
def test_nobody_else_is_predicted_where_the_first_has_room(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    """To predict costs more than to order."""
    made, load, turn = situation
    counting = {slot: Counting(*msgspec.structs.astuple(standing)) for slot, standing in load.items()}
    decision = decide(name, made, counting, turn)
    asked = [c.name for c in made if counting[c.slot].asked]
    if isinstance(decision, Decision) and len(asked) > 1:
        assert any(load[c.slot].harms_slo for c in made if c.name in asked)
    elif isinstance(decision, Decision):
        assert asked == [decision.order[0].name]


@given(every_strategy, situations(), st.randoms(use_true_random=False))
def test_the_order_in_which_deployments_are_written_changes_no_choice(  # type: ignore[no-untyped-def]
    name: str,
    situation: tuple,  # type: ignore[type-arg]
    random,
) -> None:
    made, load, turn = situation
    shuffled = list(made)
    random.shuffle(shuffled)
    one, other = decide(name, made, load, turn), decide(name, tuple(shuffled), load, turn)
    assert type(one) is type(other)
    if isinstance(one, Decision) and isinstance(other, Decision):
        assert [c.name for c in one.order] == [c.name for c in other.order]
        assert one.turn == other.turn


@given(every_strategy, situations())
def test_the_same_inputs_give_the_same_decision(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    frozen = dict(turn)
    assert decide(name, made, load, turn) == decide(name, made, load, turn)
    assert turn == frozen, "a strategy returns what it remembers, it does not edit what it was given"


@given(every_strategy, situations())
def test_a_lead_is_whom_the_strategy_would_take_first(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    """What spares most requests the comparison must never change its outcome."""
    made, load, turn = situation
    lead = strategies.find_lead(name)(made)
    welcome = lead is not None and has_room(load[lead.slot]) and not load[lead.slot].harms_slo
    if lead is not None and welcome and not spills(lead, load[lead.slot]):
        decision = decide(name, made, load, turn)
        assert isinstance(decision, Decision) and decision.order[0] is lead


@given(situations())
def test_overflow_takes_the_first_rank_below_its_spill_limit(situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    decision = decide("overflow", made, load, turn)
    if isinstance(decision, Decision):
        fit = [c for c in made if has_room(load[c.slot])]
        fit = [c for c in fit if not load[c.slot].harms_slo] or fit
        under = [c for c in fit if not spills(c, load[c.slot])]
        assert decision.order[0].rank == min(c.rank for c in under or fit)


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=2, max_size=6))
def test_shares_of_idle_deployments_are_their_units(units: list[float]) -> None:
    made = tuple(Candidate(name=f"d{slot}", slot=slot) for slot in range(len(units)))
    load = {slot: CandidateState(0, 1.0, units=cu) for slot, cu in enumerate(units)}
    turn, picks, rounds = NO_TURN, Counter[str](), 400
    for _ in range(rounds):
        decision = decide("capacity_round_robin", made, load, turn)
        assert isinstance(decision, Decision)
        turn = decision.turn
        picks[decision.order[0].name] += 1
    for candidate in made:
        share = units[candidate.slot] / sum(units)
        assert abs(picks[candidate.name] / rounds - share) < 0.05


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 5000))
def test_shares_under_load_follow_units_and_no_limit_is_passed(sizes: list[int], seed: int) -> None:
    """Requests that come and go: whoever is picked has room, and full shares are in proportion to size."""
    made = tuple(Candidate(name=f"d{slot}", slot=slot, limit=n) for slot, n in enumerate(sizes))
    in_flight = dict.fromkeys(range(len(made)), 0)
    turn: Turn = NO_TURN
    for _ in range(sum(sizes)):
        load = {slot: CandidateState(count, 1.0, sizes[slot], float(sizes[slot])) for slot, count in in_flight.items()}
        decision = decide("capacity_round_robin", made, load, turn)
        assert isinstance(decision, Decision)
        turn = decision.turn
        in_flight[decision.order[0].slot] += 1
        assert in_flight[decision.order[0].slot] <= decision.order[0].limit
    load = {slot: CandidateState(count, 1.0, sizes[slot], float(sizes[slot])) for slot, count in in_flight.items()}
    rejection = decide("capacity_round_robin", made, load, turn)
    assert isinstance(rejection, Rejection) and rejection.reason is RejectionReason.ALL_FULL


def test_rejections_say_why() -> None:
    lane = ModelRoute((Candidate(name="a", slot=0, limit=1), Candidate(name="b", slot=1)), strategies.find("overflow"))
    rejection = route(lane, {0: CandidateState(1, 1.0, 1), 1: CandidateState(0, 0.0)}, NO_TURN)
    assert isinstance(rejection, Rejection)
    assert dict(rejection.excluded) == {"a": "full: 1 of 1 in flight", "b": "not healthy"}
    slow = LatencyPrediction(3, ttft_s=3.1, tpot_s=0.02, prefill_s=3.0, late="TTFT")
    late = route(lane, {0: CandidateState(0, 1.0, 1, predicted=slow), 1: CandidateState(0, 0.0)}, NO_TURN)
    assert isinstance(late, Rejection) and late.reason is RejectionReason.ALL_FULL
    assert dict(late.excluded)["a"] == "no room: the predicted TTFT is over its target (TTFT 3.10 s, TPOT 20 ms)"
    down = route(lane, {0: CandidateState(0, 0.0), 1: CandidateState(0, 0.0)}, NO_TURN)
    assert isinstance(down, Rejection) and down.reason is RejectionReason.NONE_UP
    tried = route(lane, {0: CandidateState(0, 1.0), 1: CandidateState(0, 1.0)}, NO_TURN, tried=(0, 1))
    assert isinstance(tried, Rejection) and tried.reason is RejectionReason.ALL_TRIED


@given(every_strategy, situations(), st.data())
def test_a_paused_deployment_is_never_chosen_whatever_its_limit(
    name: str,
    situation: tuple,  # type: ignore[type-arg]
    data: st.DataObject,
) -> None:
    made, load, turn = situation
    for candidate in made:
        load[candidate.slot].paused = data.draw(st.booleans())
        load[candidate.slot].limit = data.draw(st.sampled_from([0, 1, 100]))
    decision = decide(name, made, load, turn)
    if isinstance(decision, Decision):
        assert not any(load[candidate.slot].paused for candidate in decision.order)
    for candidate in made:
        if load[candidate.slot].paused and load[candidate.slot].health > 0.0:
            assert "pause" in dict(decision.excluded)[candidate.name]
