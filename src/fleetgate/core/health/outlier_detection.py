"""Who does worse than it should: by the share of results that broke, by its own usual speed, by its region's fate."""

from collections.abc import Mapping
from math import log

import msgspec

RESULTS_MIN, BROKEN_SHARE, RESULTS_S = 20, 0.5, 10.0  # a grey failure: some requests get through. FAULTS.md row 58
REGION_MEMBERS, REGION_S = 2, 2.0  # so many that go out so close together have one cause
REGION_SHARE = 0.5  # of a region's Endpoints: two of fifty are two of fifty

BASELINE_SAMPLES = 20  # seconds with news before anything counts as usual
BASELINE_SHARE = (
    0.01  # of a second in what is usual; of one that is too slow a tenth of it, so that it becomes so in time
)
SLOW_FACTOR = 5.0  # batches grow a step by less; a brownout of 10 is well beyond. FAULTS.md rows 9 and 57
SLOW_SAMPLES = 3  # seconds in a row
BUSY_FACTOR, BUSY_MORE = 2.0, 4  # beyond it what is slow is only busy


class ResultCounts(msgspec.Struct, frozen=True, gc=False):
    """What the requests of the last seconds came to, counted from the first that broke.

    Units: seconds of the shell's clock.
    """

    since_s: float = float("-inf")
    ended: int = 0
    broken: int = 0

    def plus(self, now_s: float, broken: bool) -> "ResultCounts":
        """One more result of a request."""
        if now_s - self.since_s > RESULTS_S:
            return ResultCounts(now_s, 1, int(broken))
        return ResultCounts(self.since_s, self.ended + 1, self.broken + int(broken))

    def is_over(self, now_s: float) -> bool:
        """Whether whatever broke is long ago."""
        return now_s - self.since_s > RESULTS_S

    @property
    def mostly_broke(self) -> bool:
        """Whether more than half of enough results broke."""
        return self.ended >= RESULTS_MIN and self.broken > BROKEN_SHARE * self.ended


NO_RESULTS = ResultCounts()


class LatencyOutlier:
    """Whether one thing that is measured takes far longer than it used to, at about the same load.

    Fed with what comes by, looked at once a second. Cost: 0.3 µs a look.
    """

    __slots__ = ("_busy", "_count", "_looks", "_slow_in_a_row", "_sum", "_usual")

    def __init__(self) -> None:
        self._usual = 0.0  # logarithms of seconds: what is ten times as long weighs as much as what is a tenth
        self._busy = 0.0
        self._looks = 0
        self._slow_in_a_row = 0
        self._sum = 0.0
        self._count = 0

    def record(self, took_s: float) -> None:
        """One measurement."""
        self._sum += log(max(took_s, 1e-6))
        self._count += 1

    def evaluate(self, in_flight: int) -> bool:
        """Once a second: whether it has been far too slow for several looks with news."""
        if not self._count:
            return False
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        self._looks += 1
        if self._looks <= BASELINE_SAMPLES:
            self._learn(mean, in_flight, 1.0 / self._looks)
            return False
        slow = mean - self._usual > log(SLOW_FACTOR)
        if slow and in_flight <= BUSY_FACTOR * self._busy + BUSY_MORE:
            self._slow_in_a_row += 1
        else:
            self._slow_in_a_row = 0
        self._learn(mean, in_flight, BASELINE_SHARE / 10.0 if slow else BASELINE_SHARE)
        if self._slow_in_a_row < SLOW_SAMPLES:
            return False
        self._slow_in_a_row = 0  # once told, it has to show it again
        return True

    def _learn(self, mean: float, in_flight: int, share: float) -> None:
        self._usual += share * (mean - self._usual)
        self._busy += share * (in_flight - self._busy)


def is_region_lost(out_s: Mapping[str, float], members: int, now_s: float) -> bool:
    """Whether so many of a region went out just now that it must be the region.

    Shape: `out_s` is when, by Endpoint; `members` are all Endpoints there.
    """
    lately = sum(now_s - moment_s <= REGION_S for moment_s in out_s.values())
    return lately >= REGION_MEMBERS and lately >= REGION_SHARE * members
