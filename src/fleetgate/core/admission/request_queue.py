"""The queue of one model in one Gateway: requests wait here, never in an engine.

The order is: higher priority first; within a priority, requests that a failure moved here, then the key that was served
least, and of its requests the one with the earliest deadline. Fairness uses virtual token counters: a key's counter
rises by the CU of each request served. A key that returns from idle starts at the least counter of the waiting keys, so
that idle time earns nothing.
Source: VTC, "Fairness in serving large language models" (OSDI 2024).
"""

from enum import IntEnum
from heapq import heappop, heappush

import msgspec

# Sheddable requests use at most this share of a limit; the rest is for higher priorities.
SHEDDABLE_SHARE_MAX = 0.7
KEYS_MAX = 4096  # counters kept for keys that have no request waiting
DRAIN_WINDOW_S = 10.0


class DrainRate:
    """How many requests of a model route end per second, over the last ten seconds; Retry-After is derived from it."""

    __slots__ = ("_at_s", "_rate_per_s")

    def __init__(self) -> None:
        self._rate_per_s = 0.0
        self._at_s = 0.0

    def record_end(self, now_s: float) -> None:
        """One request ended."""
        decay = 1.0 - (now_s - self._at_s) / DRAIN_WINDOW_S
        self._rate_per_s = (self._rate_per_s * decay if decay > 0.0 else 0.0) + 1 / DRAIN_WINDOW_S
        self._at_s = now_s

    def wait_expected_s(self, ahead: int) -> float:
        """Seconds until so many requests have ended, 0 if none has ended yet."""
        return ahead / self._rate_per_s if self._rate_per_s > 0.0 else 0.0

    def retry_after_s(self, ahead: int) -> float:
        """Seconds after which a client should retry: until so many requests have ended, at least 1."""
        return max(1.0, self.wait_expected_s(ahead))


class Priority(IntEnum):
    """The order of service; requests are shed in the reverse order."""

    CRITICAL = 0
    STANDARD = 1
    SHEDDABLE = 2


PRIORITIES = {priority.name.lower(): priority for priority in Priority}


class QueueEntry(msgspec.Struct, eq=False):
    """One waiting request.

    Units: `units` is its cost in CU.
    Shape: `removed` is set when it was served, timed out or its client left; the queue then skips it.
    """

    deadline_s: float
    key: str = ""
    units: float = 1.0
    priority: Priority = Priority.STANDARD
    removed: bool = False


_Row = list[tuple[float, int, QueueEntry]]  # a heap by deadline, then by arrival


class _Band:
    """The requests of one priority."""

    __slots__ = ("by_key", "length", "moved")

    def __init__(self) -> None:
        self.length = 0
        self.moved: _Row = []
        self.by_key: dict[str, _Row] = {}


class RequestQueue:
    """Waiting requests by priority, fairness and deadline. The caller bounds the length, which it shares.

    Cost: O(log n) to join, O(waiting keys) to find the first.
    """

    __slots__ = ("_arrivals", "_bands", "_counters", "length", "units")

    def __init__(self) -> None:
        self._bands = {priority: _Band() for priority in Priority}
        self._counters: dict[str, float] = {}  # CU served to each key since it began to wait
        self._arrivals = 0
        self.length = 0
        self.units = 0.0  # of all waiting requests, in CU

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def join(self, entry: QueueEntry, ahead: bool = False) -> None:
        """Add a request. Shape: `ahead` puts it before those of its priority, for one that a failure moved here."""
        band = self._bands[entry.priority]
        self._arrivals += 1
        item = (entry.deadline_s, self._arrivals, entry)
        if ahead:
            heappush(band.moved, item)
        else:
            self._start_counter(entry.key)
            heappush(band.by_key.setdefault(entry.key, []), item)
        band.length += 1
        self.length += 1
        self.units += entry.units

    def leave(self, entry: QueueEntry, served: bool = False) -> None:
        """Remove a request at any position; a second call does nothing. A `served` one counts for its key."""
        if entry.removed:
            return
        entry.removed = True
        self._bands[entry.priority].length -= 1
        self.length -= 1
        self.units -= entry.units
        if served and entry.key in self._counters:
            self._counters[entry.key] += entry.units
        if not self.length:  # the queue is empty, so no key is behind another
            self._counters.clear()
            self._bands = {priority: _Band() for priority in Priority}
            self.units = 0.0

    def first(self) -> QueueEntry | None:
        """The request that is served next; it stays in the queue."""
        for band in self._bands.values():
            if not band.length:
                continue
            if (moved := _head(band.moved)) is not None:
                return moved
            heads = {key: head for key, row in band.by_key.items() if (head := _head(row)) is not None}
            if heads:
                return heads[min(heads, key=lambda key: (self._counters[key], heads[key].deadline_s, key))]
        return None

    def next_entries(self, count: int) -> list[QueueEntry]:
        """The first `count` requests in the order of service, so that one too long for now blocks no others."""
        chosen: list[QueueEntry] = []
        for band in self._bands.values():
            waiting = [(0.0, deadline_s, "", arrival, entry) for deadline_s, arrival, entry in band.moved]
            for key, row in band.by_key.items():
                served = 1.0 + self._counters.get(key, 0.0)
                waiting += [(served, deadline_s, key, arrival, entry) for deadline_s, arrival, entry in row]
            waiting.sort()
            chosen += [item[4] for item in waiting if not item[4].removed]
            if len(chosen) >= count:
                break
        return chosen[:count]

    def shed_candidate(self, below: Priority, key: str | None = None) -> QueueEntry | None:
        """The request to shed for one of priority `below`: the latest deadline of the lowest priority under it.

        Without one, it is a request of the same priority of the key with most requests waiting, if `key` has fewer.
        """
        for priority in reversed(Priority):
            if priority <= below:
                return None if key is None else self._latest_of_longest_row(below, key)
            waiting = [item for row in self._bands[priority].by_key.values() for item in row if not item[2].removed]
            if waiting:
                return max(waiting)[2]
        return None

    def _latest_of_longest_row(self, priority: Priority, key: str) -> QueueEntry | None:
        rows = {
            name: [item for item in row if not item[2].removed] for name, row in self._bands[priority].by_key.items()
        }
        longest = max(rows, key=lambda name: (len(rows[name]), name), default=key)
        if len(rows.get(longest, ())) <= len(rows.get(key, ())) + 1:
            return None
        return max(rows[longest])[2]

    def _start_counter(self, key: str) -> None:
        """Give a key that begins to wait its counter: its own, but at least the least of the waiting keys."""
        waiting = {k for band in self._bands.values() for k, row in band.by_key.items() if _head(row) is not None}
        if key not in waiting:
            least = min((self._counters[other] for other in waiting), default=0.0)
            if len(self._counters) > KEYS_MAX:
                self._counters = {other: self._counters[other] for other in waiting}
            self._counters[key] = max(least, self._counters.get(key, 0.0))


def _head(row: _Row) -> QueueEntry | None:
    while row and row[0][2].removed:
        heappop(row)
    return row[0][2] if row else None
