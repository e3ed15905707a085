"""The ledger: never above a limit, never below zero, back to zero on every path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleetgate.core.admission.ledger import Ledger, SettledTwice
from fleetgate.ipc.shared_memory import SharedMemory

SLOTS = 3


def board_for(workers: int) -> SharedMemory:
    """A board in ordinary memory."""
    return SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(workers))), workers)


class LedgerMachine(RuleBasedStateMachine):
    """Several workers reserve and settle in any order; one may die and be swept."""

    @initialize(workers=st.integers(1, 4), limit=st.integers(1, 5))
    def begin(self, workers: int, limit: int) -> None:
        self.board = board_for(workers)
        self.workers = workers
        self.limit = limit
        self.ledgers = [Ledger(self.board, index) for index in range(workers)]
        self.held: list[tuple[int, int]] = []

    @rule(worker=st.integers(0, 3), slot=st.integers(0, SLOTS - 1))
    def reserve(self, worker: int, slot: int) -> None:
        worker %= self.workers
        before = sum(1 for _, held in self.held if held == slot)
        taken = self.ledgers[worker].reserve(slot, self.limit)
        assert taken == (before < self.limit)
        if taken:
            self.held.append((worker, slot))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        worker, slot = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.ledgers[worker].settle(slot)

    @rule(worker=st.integers(0, 3))
    def die(self, worker: int) -> None:
        worker %= self.workers
        mine = [entry for entry in self.held if entry[0] == worker]
        assert self.board.clear_worker(worker) == len(mine)
        self.held = [entry for entry in self.held if entry[0] != worker]

    @invariant()
    def counts_are_what_is_held(self) -> None:
        if not hasattr(self, "board"):
            return
        for slot in range(SLOTS):
            held = sum(1 for _, other in self.held if other == slot)
            assert self.board.in_flight_total(slot) == held <= self.limit

    def teardown(self) -> None:
        for worker, slot in getattr(self, "held", []):
            self.ledgers[worker].settle(slot)
        if hasattr(self, "board"):
            assert all(self.board.in_flight_total(slot) == 0 for slot in range(SLOTS))


TestLedger = LedgerMachine.TestCase


@given(st.integers(1, 4))
def test_what_is_not_held_cannot_be_given_back(workers: int) -> None:
    with pytest.raises(SettledTwice):
        Ledger(board_for(workers), workers - 1).settle(0)


def test_a_limit_of_zero_means_none() -> None:
    board = board_for(1)
    ledger = Ledger(board, 0)
    assert all(ledger.reserve(0, 0) for _ in range(1000))
    assert board.in_flight_total(0) == 1000
