"""The requests in flight at each Deployment: reserved in one step at the decision, settled on every path."""

from collections.abc import Callable
from typing import Protocol


class SettledTwice(RuntimeError):
    """A reservation is settled that is not held: a bug in the caller."""


def _no_lock(slot: int) -> None:
    """A single worker needs no lock."""


class InFlightMemory(Protocol):
    """Memory that all workers share. Shape: `in_flight` is [Deployment slot][worker]."""

    @property
    def workers(self) -> int:
        """The number of columns."""

    @property
    def in_flight(self) -> memoryview:
        """Requests in flight, one signed 64-bit cell for each worker."""


class Ledger:
    """One worker's access to the in-flight counts that all workers of a machine share.

    A worker writes only its own cell. The limit holds over the sum, because sum and write happen under `lock`.
    Shape: `lock(slot)` and `unlock(slot)` bracket one Deployment; the kernel must free the lock when its holder dies.
    Cost: 0.3 µs with one worker, 2 µs with a lock (fcntl, two system calls).
    """

    __slots__ = ("_cells", "_is_alone", "_lock", "_unlock", "_worker", "_workers", "first", "last")

    def __init__(
        self,
        cells: InFlightMemory,
        worker: int,
        lock: Callable[[int], None] = _no_lock,
        unlock: Callable[[int], None] = _no_lock,
    ) -> None:
        self._cells = cells.in_flight
        self._worker = worker
        self._workers = cells.workers
        self._lock = lock
        self._unlock = unlock
        self.set_columns(0, cells.workers)

    def set_columns(self, first: int, last: int) -> None:
        """Count the columns from `first` up to, not including, `last`; no worker may write to the others."""
        self.first, self.last = first, last
        self._is_alone = last - first == 1

    def in_flight(self, slot: int) -> int:
        """Requests in flight at a Deployment over all workers."""
        at = slot * self._workers
        if self._is_alone:
            return self._cells[at + self._worker]
        return sum(self._cells[at + self.first : at + self.last])

    def reserve(self, slot: int, limit: int) -> bool:
        """Count one request in flight at a Deployment; False if it is at its limit. A limit of 0 means none."""
        at = slot * self._workers + self._worker
        if limit <= 0:
            self._cells[at] += 1
            return True
        if self._is_alone:
            if self._cells[at] >= limit:
                return False
            self._cells[at] += 1
            return True
        self._lock(slot)
        try:
            if self.in_flight(slot) >= limit:
                return False
            self._cells[at] += 1
            return True
        finally:
            self._unlock(slot)

    def settle(self, slot: int) -> None:
        """Count one request less in flight.

        Raises: `SettledTwice` if this worker has none in flight there.
        """
        at = slot * self._workers + self._worker
        if self._cells[at] <= 0:
            raise SettledTwice(f"Deployment slot {slot}: worker {self._worker} holds no reservation to settle")
        self._cells[at] -= 1
