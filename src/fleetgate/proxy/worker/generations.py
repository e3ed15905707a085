"""Two generations of workers: which columns of shared memory are summed while the old workers finish their responses.

A generation has half of the columns. While it is alone, its workers sum and lock over their own half only. Before a
worker of the next generation accepts, every running worker must sum over all columns, which `SHARES` says.
"""

from collections.abc import Callable

from fleetgate.core.admission.ledger import Ledger
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell


class Generations:
    """Follows the other generation, for one worker. It starts with all columns, which is always correct."""

    def __init__(self, shared: SharedMemory, worker: int, serving: int, ledger: Ledger) -> None:
        self._shared = shared
        self._worker = worker
        self._ledger = ledger
        self._first = worker // serving * serving
        self._last = self._first + serving
        self._others = [column for column in range(shared.workers) if not self._first <= column < self._last]
        self._columns = range(shared.workers)
        self._followers: list[Callable[[range], None]] = []
        self._set_columns(True)

    def follow(self, follower: Callable[[range], None]) -> None:
        """Call this with the columns to sum, now and after each change."""
        self._followers.append(follower)
        follower(self._columns)

    def tick(self) -> None:
        """Check the other generation, every 50 ms. Cost: 0.1 µs a column."""
        shares = bool(self._shared.get(self._worker, WorkerCell.SHARES))
        has_other = self._has_other_generation()
        if has_other and not shares:
            self._set_columns(True)
        elif shares and not has_other:
            # First the mark is cleared: a worker that starts meanwhile waits for it, or the second check finds it.
            self._shared.set(self._worker, WorkerCell.SHARES, 0)
            self._set_columns(self._has_other_generation())

    def may_serve(self) -> bool:
        """Whether every running worker includes this one in its sums."""
        return all(
            self._shared.get(column, WorkerCell.SHARES)
            for column in self._others
            if self._shared.get(column, WorkerCell.DUTY)
        )

    def newest_version(self) -> int:
        """The newest Snapshot that a worker of the other generation uses."""
        return max((self._shared.get(column, WorkerCell.SNAPSHOT_VERSION) for column in self._others), default=0)

    def _has_other_generation(self) -> bool:
        return any(self._shared.get(column, WorkerCell.DUTY) for column in self._others)

    def _set_columns(self, with_all: bool) -> None:
        columns = self._columns = range(self._shared.workers) if with_all else range(self._first, self._last)
        self._ledger.set_columns(columns.start, columns.stop)
        for follower in self._followers:
            follower(columns)
        if with_all:
            self._shared.set(self._worker, WorkerCell.SHARES, 1)
