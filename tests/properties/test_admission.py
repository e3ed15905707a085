"""The waiting room: in order, each once, nobody forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission import Ticket, WaitingRoom


@given(st.lists(st.sampled_from(["join", "first", "leave"]), max_size=60), st.randoms(use_true_random=False))
def test_the_room_agrees_with_a_plain_list(steps: list[str], random) -> None:  # type: ignore[no-untyped-def]
    room, model, now_s = WaitingRoom(), list[Ticket](), 0.0
    for step in steps:
        now_s += 1.0
        if step == "join":
            ticket = Ticket(deadline_s=now_s + random.randint(1, 10))
            ahead = random.random() < 0.2
            room.join(ticket, ahead)
            model.insert(0 if ahead else len(model), ticket)
        elif step == "first":
            assert room.first() is (model[0] if model else None)
        elif step == "leave" and model:
            ticket = model.pop(random.randrange(len(model)))
            room.leave(ticket)
            room.leave(ticket)
        assert len(room) == len(model)
