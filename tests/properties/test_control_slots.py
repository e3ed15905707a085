"""Slots are never shared, are kept while in use, and are given again only when no fresh one is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine

from fleetgate.control.store import slot_allocator as slots
from fleetgate.control.store.schema import metadata

ROUNDS = st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=6), max_size=20)


@contextmanager
def store() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        metadata.create_all(connection)
        yield connection
    engine.dispose()


@given(ROUNDS, st.integers(6, 12))
def test_slots_are_unique_stable_and_reused_last(rounds: list[set[str]], size: int) -> None:
    with store() as connection, mock.patch.dict(slots.SPACES, {"gateway": size}):
        held: dict[str, int] = {}
        used: list[int] = []
        free: list[int] = []  # in the order in which they became free
        for owners in rounds:
            given_ = slots.assign(connection, "gateway", sorted(owners))
            assert set(given_) == owners, "there is room for all"
            assert len(set(given_.values())) == len(given_), "two owners share a slot"
            assert all(0 <= slot < size for slot in given_.values())
            free += sorted(slot for owner, slot in held.items() if owner not in owners)
            for owner in sorted(owners):
                if owner in held:
                    assert given_[owner] == held[owner], "an owner lost its slot"
                elif len(used) < size:
                    assert given_[owner] == len(used), "the lowest number never used"
                    used.append(given_[owner])
                else:
                    assert given_[owner] == free.pop(0), "the one that was free for longest"
            held = given_


@given(st.sets(st.text(min_size=1, max_size=8, alphabet="abc"), min_size=4, max_size=9))
def test_who_finds_no_slot_is_left_out_and_nobody_is_robbed(owners: set[str]) -> None:
    with store() as connection, mock.patch.dict(slots.SPACES, {"gateway": 3}):
        first = slots.assign(connection, "gateway", sorted(owners))
        assert len(first) == 3
        assert slots.assign(connection, "gateway", sorted(owners, reverse=True)) == first


def test_spaces_do_not_meet() -> None:
    with store() as connection:
        assert slots.assign(connection, "gateway", ["a"]) == {"a": 0}
        assert slots.assign(connection, "deployment", ["b", "a"]) == {"b": 0, "a": 1}
        assert slots.assign(connection, "gateway", ["a"]) == {"a": 0}
