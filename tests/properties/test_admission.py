"""The waiting room: priority, then fairness between keys, then deadlines; each once, nobody forgotten."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.request_queue import Priority, QueueEntry, RequestQueue

TICKETS = st.builds(
    QueueEntry,
    deadline_s=st.floats(0, 100),
    key=st.sampled_from(["a", "b", "c"]),
    units=st.sampled_from([0.5, 1.0, 4.0]),
    priority=st.sampled_from(list(Priority)),
)


@given(st.lists(st.tuples(TICKETS, st.booleans()), max_size=40), st.randoms(use_true_random=False))
def test_whoever_joins_comes_first_once_or_leaves(joins: list[tuple[QueueEntry, bool]], random) -> None:  # type: ignore[no-untyped-def]
    room, here = RequestQueue(), list[QueueEntry]()
    for ticket, moved in joins:
        room.join(ticket, moved)
        here.append(ticket)
        if random.random() < 0.3:
            gone = here.pop(random.randrange(len(here)))
            room.leave(gone)
            room.leave(gone)
        assert len(room) == len(here)
        assert abs(room.units - sum(waiting.units for waiting in here)) < 1e-6
        assert sorted(map(id, room.next_entries(99))) == sorted(map(id, here))
    while (first := room.first()) is not None:
        assert first is room.next_entries(1)[0]
        assert first.priority == min(waiting.priority for waiting in here)
        here.remove(first)
        room.leave(first, served=True)
    assert not here and not room


@given(st.lists(TICKETS, min_size=2, max_size=20))
def test_inside_one_key_the_earliest_deadline_goes_first(tickets: list[QueueEntry]) -> None:
    room = RequestQueue()
    for ticket in tickets:
        ticket.key, ticket.priority = "a", Priority.STANDARD
        room.join(ticket)
    served = []
    while (first := room.first()) is not None:
        served.append(first.deadline_s)
        room.leave(first, served=True)
    assert served == sorted(served)


@given(st.integers(2, 6), st.floats(0.1, 9.0), st.integers(30, 120))
def test_keys_that_always_wait_get_the_same_work_whatever_their_requests_weigh(
    keys: int, heavy: float, rounds: int
) -> None:
    """One key sends requests many times as heavy: it is given fewer of them, not more work."""
    room, given_units = RequestQueue(), dict.fromkeys((f"k{n}" for n in range(keys)), 0.0)
    sizes = {key: heavy if at == 0 else 1.0 for at, key in enumerate(given_units)}
    for key, units in sizes.items():
        for at in range(3):
            room.join(QueueEntry(float(at), key, units))
    for at in range(rounds):
        first = room.first()
        assert first is not None
        room.leave(first, served=True)
        given_units[first.key] += first.units
        room.join(QueueEntry(float(at + 3), first.key, first.units))
    assert max(given_units.values()) - min(given_units.values()) <= 2 * max(heavy, 1.0)


def test_a_key_that_was_away_has_saved_nothing_up() -> None:
    room = RequestQueue()
    for at in range(10):
        room.join(QueueEntry(float(at), "busy"))
    for _ in range(6):
        first = room.first()
        assert first is not None
        room.leave(first, served=True)
    for at in range(10):
        room.join(QueueEntry(float(at), "back"))
    served = []
    for _ in range(8):
        first = room.first()
        assert first is not None
        served.append(first.key)
        room.leave(first, served=True)
    assert served.count("busy") == served.count("back") == 4


@given(st.lists(TICKETS, max_size=20), st.sampled_from(list(Priority)))
def test_only_a_lower_priority_is_shed_and_of_it_the_latest(tickets: list[QueueEntry], priority: Priority) -> None:
    room = RequestQueue()
    for ticket in tickets:
        room.join(ticket)
    victim = room.shed_candidate(priority)
    lower = [ticket for ticket in tickets if ticket.priority > priority]
    if victim is None:
        assert not lower
        return
    lowest = max(ticket.priority for ticket in lower)
    assert victim.priority == lowest
    assert victim.deadline_s == max(ticket.deadline_s for ticket in lower if ticket.priority == lowest)


@given(st.integers(0, 12), st.integers(0, 12))
def test_in_a_full_row_the_key_with_most_waiting_gives_way_to_one_with_fewer(eager: int, modest: int) -> None:
    room = RequestQueue()
    for at in range(eager):
        room.join(QueueEntry(float(at), "eager"))
    for at in range(modest):
        room.join(QueueEntry(float(at), "modest"))
    victim = room.shed_candidate(Priority.STANDARD, "modest")
    assert room.shed_candidate(Priority.STANDARD, "eager" if eager >= modest else "modest") is None
    if eager > modest + 1:
        assert victim is not None and (victim.key, victim.deadline_s) == ("eager", eager - 1.0)
    else:
        assert victim is None


def test_what_a_failure_moved_here_goes_first_in_its_priority() -> None:
    room = RequestQueue()
    early, moved, critical = QueueEntry(1.0), QueueEntry(9.0), QueueEntry(9.0, priority=Priority.CRITICAL)
    room.join(early)
    room.join(moved, ahead=True)
    assert room.next_entries(3) == [moved, early]
    room.join(critical)
    assert room.next_entries(3) == [critical, moved, early]
