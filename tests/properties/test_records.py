"""What was decided is decided again from its record, through bytes and under other slots."""

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.routing import strategies
from fleetgate.core.routing.decision_record import (
    RecordedDecision,
    RecordedEnd,
    RequestIdentity,
    chosen_deployment,
    decode_record,
    encode_record,
    is_same_decision,
    missed_slo,
    record_decision,
    replay_decision,
)
from fleetgate.core.routing.route import Decision, ModelRoute, route
from fleetgate.core.routing.scheduler import ConsideredDecision, ScheduleRequest, limit_for_priority, preferred_first
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load, Turn
from tests.properties.test_routing import every_strategy, situations

WHOSE = RequestIdentity(1.0, "req_1", "g", "m", "k", "eu", 1)
priorities = st.sampled_from(Priority)
slots = st.lists(st.integers(0, 8), max_size=3, unique=True)


def recorded(
    made: tuple[Candidate, ...],
    load: Load,
    turn: Turn,
    name: str,
    wish: ScheduleRequest | None = None,
    tried: list[int] | None = None,
) -> RecordedDecision:
    """A decision as a desk takes it, its record written and read."""
    wish, tried = wish or ScheduleRequest(RequestShape(100.0, 50.0)), tried or []
    decision = route(ModelRoute(made, strategies.find(name)), load, turn, tried)
    chosen = ""
    if isinstance(decision, Decision):
        for candidate in preferred_first(decision.order, wish.preferred):
            limit = limit_for_priority(wish.priority, load[candidate.slot].limit)
            if not load[candidate.slot].late and (not limit or load[candidate.slot].in_flight < limit):
                chosen = candidate.name
                break
    record = decode_record(
        encode_record(record_decision(WHOSE, ConsideredDecision(made, load, turn, 2.0, decision), wish, tried, chosen))
    )
    assert isinstance(record, RecordedDecision)
    return record


def moved(made: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The same Deployments under the slots of another store."""
    return tuple(msgspec.structs.replace(candidate, slot=candidate.slot + 100) for candidate in made)


@given(every_strategy, situations(), priorities, slots, slots)
def test_a_recorded_decision_is_taken_again(
    name: str,
    situation: tuple,  # type: ignore[type-arg]
    priority: Priority,
    preferred: list[int],
    tried: list[int],
) -> None:
    made, load, turn = situation
    wish = ScheduleRequest(RequestShape(100.0, 50.0), priority=priority, preferred=tuple(preferred))
    record = recorded(made, load, turn, name, wish, tried)
    again = replay_decision(record, ModelRoute(moved(made), strategies.find(name)))
    assert is_same_decision(record, again)
    assert chosen_deployment(record, again) == record.chosen


@given(situations())
def test_another_configuration_may_decide_otherwise_but_never_for_the_unknown(situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record = recorded(made, load, turn, "overflow")
    stranger = Candidate(name="stranger", slot=99)
    again = replay_decision(record, ModelRoute((*made, stranger), strategies.find("capacity_round_robin")))
    if isinstance(again, Decision):
        assert stranger not in again.order


@given(situations())
def test_a_turn_that_is_not_what_it_was_is_noticed(situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record = recorded(made, load, turn, "capacity_round_robin")
    standings = [load[candidate.slot] for candidate in made if candidate.name in record.order]
    # Without anything free the order is by load, and turns have no say.
    assume(len(standings) > 1 and any((s.limit or s.places) and s.health > 0.0 for s in standings))
    last = record.order[-1]
    corrupted = msgspec.structs.replace(record, turn={**record.turn, last: record.turn.get(last, 0.0) + 1e6})
    assert not is_same_decision(
        corrupted, replay_decision(corrupted, ModelRoute(made, strategies.find("capacity_round_robin")))
    )


@given(every_strategy, situations())
def test_a_choice_that_is_not_in_the_order_is_noticed(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record = msgspec.structs.replace(recorded(made, load, turn, name), chosen="somebody else")
    assert not is_same_decision(record, replay_decision(record, ModelRoute(made, strategies.find(name))))


@given(every_strategy, situations())
def test_only_those_that_were_predicted_late_or_were_not_placed_are_said_to_miss(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record = recorded(made, load, turn, name)
    late = missed_slo(record, record.chosen, tpot_s=0.5)
    if not record.chosen:
        assert late is True
        return
    fit = next(load[candidate.slot].prediction for candidate in made if candidate.name == record.chosen)
    assert late == (None if fit is None else fit.ttft_s > 2.0 or fit.tpot_s > 0.5)


def test_the_end_of_a_request_is_a_record_too_and_anything_else_is_none() -> None:
    ended = RecordedEnd(**WHOSE._asdict(), outcome="ok", duration_s=1.5, prompt_tokens=10, output_tokens=3)
    assert decode_record(encode_record(ended)) == ended
    for line in (
        b"",
        b"{}",
        b'{"record":"decision"}',
        encode_record(ended)[:-9],
        b"null",
        b"\xff\n",
        b'{"record":"\xff"}',
    ):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError)):
            decode_record(line)


def test_a_paused_candidate_is_recorded_as_a_million_in_flight_and_stays_paused() -> None:
    made = (Candidate(name="a", slot=0), Candidate(name="b", slot=1))
    load = {0: CandidateState(3, 1.0, paused=True), 1: CandidateState(2, 1.0)}
    record = recorded(made, load, {}, "overflow")
    assert (record.load["a"].in_flight, record.load["a"].limit) == (1_000_003, 1), "as earlier versions wrote it"
    assert record.order == ["b"]
    again = replay_decision(record, ModelRoute(moved(made), strategies.find("overflow")))
    assert is_same_decision(record, again) and dict(again.excluded)["a"].startswith("full: its engine asked")


def test_a_record_of_an_earlier_version_with_a_paused_candidate_gives_the_same_decision() -> None:
    line = (
        b'{"record":"decision","at_s":1.0,"gateway":"g","model":"m","key":"k","prompt_tokens":10.0,'
        b'"output_tokens":5.0,"load":{"a":[1000003,1.0,1,1.0,null,0.0,0.0,32],"b":[2,1.0,0,1.0,null,0.0,0.0,32]},'
        b'"turn":{},"tried":[],"order":["b"],"chosen":"b"}'
    )
    record = decode_record(line)
    assert isinstance(record, RecordedDecision)
    made = (Candidate(name="a", slot=7), Candidate(name="b", slot=8))
    again = replay_decision(record, ModelRoute(made, strategies.find("overflow")))
    assert is_same_decision(record, again) and chosen_deployment(record, again) == "b"
