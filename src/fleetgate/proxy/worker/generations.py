"""Two generations of workers side by side: which workers count together while the old ones finish their answers.

A generation has half of the columns of shared memory. Alone, a worker sums and locks over its own half only. Before one
of the next generation accepts, every running worker must have begun to count with all columns: `SHARES` says so.
"""

from collections.abc import Callable

from fleetgate.core.admission.ledger import Ledger
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell


class Generations:
    """One worker's view of the other generation. It starts by counting with all columns, which is always right."""

    def __init__(self, shared: SharedMemory, worker: int, serving: int, ledger: Ledger) -> None:
        self._shared = shared
        self._worker = worker
        self._ledger = ledger
        self._first = worker // serving * serving
        self._last = self._first + serving
        self._others = [column for column in range(shared.workers) if not self._first <= column < self._last]
        self._columns = range(shared.workers)
        self._followers: list[Callable[[range], None]] = []
        self._count(True)

    def follow(self, follower: Callable[[range], None]) -> None:
        """Call this with the columns that count together, now and after each change."""
        self._followers.append(follower)
        follower(self._columns)

    def tick(self) -> None:
        """Every 50 ms. Cost: 0.1 µs a column."""
        shares = bool(self._shared.get(self._worker, WorkerCell.SHARES))
        has_other = self._has_other_generation()
        if has_other and not shares:
            self._count(True)
        elif shares and not has_other:
            # The mark goes first: a worker that came since then either waits for it or is seen by the second look.
            self._shared.set(self._worker, WorkerCell.SHARES, 0)
            self._count(self._has_other_generation())

    def may_serve(self) -> bool:
        """Whether every running worker counts with this one too."""
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

    def _count(self, with_all: bool) -> None:
        columns = self._columns = range(self._shared.workers) if with_all else range(self._first, self._last)
        self._ledger.set_columns(columns.start, columns.stop)
        for follower in self._followers:
            follower(columns)
        if with_all:
            self._shared.set(self._worker, WorkerCell.SHARES, 1)
