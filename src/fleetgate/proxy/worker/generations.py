"""Two generations of workers side by side: who counts with whom while the old one finishes its answers.

A generation has half of the board's columns. Alone, a worker sums and locks over its own half only. Before one of the
next generation accepts, every worker that is there must have begun to count with all columns: `SHARES` says so.
"""

from collections.abc import Callable

from fleetgate.core.admission.ledger import Ledger
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell


class Generations:
    """One worker's view of the other generation. It starts by counting with everybody, which is always right."""

    def __init__(self, board: SharedMemory, index: int, serving: int, ledger: Ledger) -> None:
        self._board = board
        self._index = index
        self._ledger = ledger
        self._first = index // serving * serving
        self._last = self._first + serving
        self._others = [column for column in range(board.workers) if not self._first <= column < self._last]
        self.on_change: Callable[[range], None] = lambda columns: None
        self._share(True)

    def look(self) -> None:
        """Called by the sweep. Cost: 0.1 µs a column."""
        shared = bool(self._board.get(self._index, WorkerCell.SHARES))
        wanted = self._is_there()
        if wanted and not shared:
            self._share(True)
        elif shared and not wanted:
            # The mark goes first: whoever came since then either waits for it or is seen by the second look.
            self._board.set(self._index, WorkerCell.SHARES, 0)
            self._share(self._is_there())

    def may_serve(self) -> bool:
        """Whether everybody there counts with this worker too."""
        board = self._board
        return all(
            board.get(column, WorkerCell.SHARES) for column in self._others if board.get(column, WorkerCell.DUTY)
        )

    def versions(self) -> int:
        """The newest Snapshot that a worker of the other generation uses."""
        return max((self._board.get(column, WorkerCell.SNAPSHOT_VERSION) for column in self._others), default=0)

    def _is_there(self) -> bool:
        return any(self._board.get(column, WorkerCell.DUTY) for column in self._others)

    def _share(self, everybody: bool) -> None:
        columns = range(self._board.workers) if everybody else range(self._first, self._last)
        self._ledger.set_columns(columns.start, columns.stop)
        self.on_change(columns)
        if everybody:
            self._board.set(self._index, WorkerCell.SHARES, 1)
