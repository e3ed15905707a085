"""What was decided is decided again from its record, through bytes and under other slots."""

import msgspec
from hypothesis import given

from fleetgate.core import strategies
from fleetgate.core.record import Recorded, decide_again, line_of, read_line, same, stood_of, turn_of
from fleetgate.core.route import Decision, Lane, route
from fleetgate.core.strategies import Candidate, Load, Turn
from tests.properties.test_routing import every_strategy, situations


def recorded(made: tuple[Candidate, ...], load: Load, turn: Turn, name: str) -> tuple[Recorded, list[str]]:
    decision = route(Lane(made, strategies.find(name)), load, turn)
    order = [candidate.name for candidate in decision.order] if isinstance(decision, Decision) else []
    record = Recorded(
        at_s=1.0,
        gateway="g",
        model="m",
        key="k",
        prompt_tokens=100.0,
        output_tokens=50.0,
        load=stood_of(made, load),
        turn=turn_of(made, turn),
        tried=[],
        order=order,
        chosen=order[0] if order else "",
    )
    return read_line(line_of(record)), order


@given(every_strategy, situations())
def test_a_recorded_decision_is_taken_again(name: str, situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record, _ = recorded(made, load, turn, name)
    elsewhere = tuple(msgspec.structs.replace(candidate, slot=candidate.slot + 100) for candidate in made)
    assert same(record, decide_again(record, Lane(elsewhere, strategies.find(name))))


@given(situations())
def test_another_configuration_may_decide_otherwise_but_never_for_the_unknown(situation: tuple) -> None:  # type: ignore[type-arg]
    made, load, turn = situation
    record, _ = recorded(made, load, turn, "overflow")
    stranger = Candidate(name="stranger", slot=99)
    again = decide_again(record, Lane((*made, stranger), strategies.find("capacity_round_robin")))
    if isinstance(again, Decision):
        assert stranger not in again.order
