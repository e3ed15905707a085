"""The waiting room of one model in one Gateway: requests wait here, never in an engine.

Whose turn it is: the higher priority first; inside one, requests that a failure moved here, then the key that has had
least, and of its requests the one whose deadline comes first. Fairness is by virtual token counters: a key's counter
rises by the CU of what it is given, and one that comes back from idle starts no lower than the least of those waiting,
so that nobody saves up. Source: VTC (OSDI'24); ALGORITHMS.md section 8.3.
"""

from enum import IntEnum
from heapq import heappop, heappush

import msgspec

# A request that may be shed waits as soon as this much of a limit is in use, so that the rest stays for the others.
SHEDDABLE_SHARE_MAX = 0.7
KEYS_MAX = 4096  # counters kept of keys that wait no more, while others do


DRAIN_WINDOW_S = 10.0


class DrainRate:
    """How much of what a Lane serves ends a second, over the last seconds: what Retry-After is worked out from."""

    __slots__ = ("_at_s", "_rate_per_s")

    def __init__(self) -> None:
        self._rate_per_s = 0.0
        self._at_s = 0.0

    def record_end(self, now_s: float) -> None:
        """One request ended."""
        kept = 1.0 - (now_s - self._at_s) / DRAIN_WINDOW_S
        self._rate_per_s = (self._rate_per_s * kept if kept > 0.0 else 0.0) + 1 / DRAIN_WINDOW_S
        self._at_s = now_s

    def wait_expected_s(self, ahead: int) -> float:
        """Seconds until so many have ended, 0 where nothing has ended yet."""
        return ahead / self._rate_per_s if self._rate_per_s > 0.0 else 0.0

    def retry_after_s(self, ahead: int) -> float:
        """When to come back: once so many have ended, and never sooner than a second."""
        return max(1.0, self.wait_expected_s(ahead))


class Priority(IntEnum):
    """What goes first, and, in reverse, what is shed first."""

    CRITICAL = 0
    STANDARD = 1
    SHEDDABLE = 2


PRIORITIES = {priority.name.lower(): priority for priority in Priority}


class QueueEntry(msgspec.Struct, eq=False):
    """One waiting request. `left` is set when it went on, gave up or timed out; it is then skipped.

    Units: `units` is its cost in CU.
    """

    deadline_s: float
    key: str = ""
    units: float = 1.0
    priority: Priority = Priority.STANDARD
    removed: bool = False


class _Band:
    """The requests of one priority."""

    __slots__ = ("by_key", "moved_entries", "new_entries")

    def __init__(self) -> None:
        self.new_entries = 0
        self.moved_entries: list[tuple[float, int, QueueEntry]] = []
        self.by_key: dict[str, list[tuple[float, int, QueueEntry]]] = {}


class RequestQueue:
    """Tickets by priority, fairness and deadline; the bound is the caller's, which shares it.

    Cost: O(log n) to join, O(keys that wait) to find the first.
    """

    __slots__ = ("_bands", "_counters", "_here", "_joined", "units")

    def __init__(self) -> None:
        self._bands = {priority: _Band() for priority in Priority}
        self._counters: dict[str, float] = {}  # CU given to each key that waits
        self._joined = 0
        self._here = 0
        self.units = 0.0  # what waits, in CU

    def __len__(self) -> int:
        return self._here

    def __bool__(self) -> bool:
        return self._here > 0

    def join(self, ticket: QueueEntry, ahead: bool = False) -> None:
        """Wait among those of its priority, or, for a request that was moved here by a failure, ahead of them."""
        band = self._bands[ticket.priority]
        self._joined += 1
        entry = (ticket.deadline_s, self._joined, ticket)
        if ahead:
            heappush(band.moved_entries, entry)
        else:
            self._count(ticket.key)
            heappush(band.by_key.setdefault(ticket.key, []), entry)
        band.new_entries += 1
        self._here += 1
        self.units += ticket.units

    def leave(self, ticket: QueueEntry, served: bool = False) -> None:
        """Stop waiting, wherever in the row; leaving twice does nothing. What is `served` counts for its key."""
        if ticket.removed:
            return
        ticket.removed = True
        self._bands[ticket.priority].new_entries -= 1
        self._here -= 1
        self.units -= ticket.units
        if served and ticket.key in self._counters:
            self._counters[ticket.key] += ticket.units
        if not self._here:  # nobody waits, so nobody is behind
            self._counters.clear()
            self._bands = {priority: _Band() for priority in Priority}
            self.units = 0.0

    def first(self) -> QueueEntry | None:
        """The one whose turn it is, without taking it."""
        for band in self._bands.values():
            if not band.new_entries:
                continue
            if (moved := _head(band.moved_entries)) is not None:
                return moved
            heads = {key: head for key, row in band.by_key.items() if (head := _head(row)) is not None}
            if heads:
                return heads[min(heads, key=lambda key: (self._counters[key], heads[key].deadline_s, key))]
        return None

    def next_entries(self, most: int) -> list[QueueEntry]:
        """The first so many in the order of their turns: a request that is too long for now blocks no others."""
        chosen: list[QueueEntry] = []
        for band in self._bands.values():
            waiting = [(0.0, deadline_s, "", joined, ticket) for deadline_s, joined, ticket in band.moved_entries]
            for key, row in band.by_key.items():
                given = 1.0 + self._counters.get(key, 0.0)
                waiting += [(given, deadline_s, key, joined, ticket) for deadline_s, joined, ticket in row]
            waiting.sort()
            chosen += [entry[4] for entry in waiting if not entry[4].removed]
            if len(chosen) >= most:
                break
        return chosen[:most]

    def shed_candidate(self, below: Priority, key: str | None = None) -> QueueEntry | None:
        """Whom to shed so that a request of priority `below` may wait: of the lowest priority the latest deadline.

        Among equals it is one of the key that has most waiting, where `key` has fewer: a row is shared like turns are.
        """
        for priority in reversed(Priority):
            if priority <= below:
                return None if key is None else self._of_the_greediest(below, key)
            waiting = [entry for row in self._bands[priority].by_key.values() for entry in row if not entry[2].removed]
            if waiting:
                return max(waiting)[2]
        return None

    def _of_the_greediest(self, priority: Priority, key: str) -> QueueEntry | None:
        rows = {
            name: [entry for entry in row if not entry[2].removed] for name, row in self._bands[priority].by_key.items()
        }
        most = max(rows, key=lambda name: (len(rows[name]), name), default=key)
        if len(rows.get(most, ())) <= len(rows.get(key, ())) + 1:
            return None
        return max(rows[most])[2]

    def _count(self, key: str) -> None:
        """A key's counter when it joins: its own, but no lower than the least of those that wait."""
        waiting = {k for band in self._bands.values() for k, row in band.by_key.items() if _head(row) is not None}
        if key not in waiting:
            least = min((self._counters[other] for other in waiting), default=0.0)
            if len(self._counters) > KEYS_MAX:
                self._counters = {other: self._counters[other] for other in waiting}
            self._counters[key] = max(least, self._counters.get(key, 0.0))


def _head(row: list[tuple[float, int, QueueEntry]]) -> QueueEntry | None:
    while row and row[0][2].removed:
        heappop(row)
    return row[0][2] if row else None
