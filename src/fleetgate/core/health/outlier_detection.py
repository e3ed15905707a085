"""Outliers: an Endpoint that mostly fails or is far slower than usual, and a region that is lost."""

from collections.abc import Mapping
from math import log

import msgspec

RESULTS_MIN, BROKEN_SHARE, RESULTS_S = 20, 0.5, 10.0  # a grey failure lets some requests through: faults.md row 58
REGION_MEMBERS, REGION_S = 2, 2.0  # so many Endpoints of a region ejected within this time have one cause
REGION_SHARE = 0.5  # of the region's Endpoints: two of fifty are not the region

BASELINE_SAMPLES = 20  # seconds with measurements before a mean is compared with the baseline
BASELINE_SHARE = 0.01  # weight of one second in the baseline; a tenth of it for a slow one, so it becomes usual in time
SLOW_FACTOR = 5.0  # a batch that grows lengthens a step by less; a brownout of 10 is above. faults.md rows 9 and 57
SLOW_SAMPLES = 3  # seconds in a row
BUSY_FACTOR, BUSY_MORE = 2.0, 4  # with more load than this, relative to the baseline, slow means busy


class ResultCounts(msgspec.Struct, frozen=True, gc=False):
    """Results of the requests of the last seconds, counted from the first that failed.

    Units: seconds of the caller's clock.
    """

    since_s: float = float("-inf")
    ended: int = 0
    broken: int = 0

    def plus(self, now_s: float, broken: bool) -> "ResultCounts":
        """The counts with one more result."""
        if now_s - self.since_s > RESULTS_S:
            return ResultCounts(now_s, 1, int(broken))
        return ResultCounts(self.since_s, self.ended + 1, self.broken + int(broken))

    def is_over(self, now_s: float) -> bool:
        """Whether the window has ended."""
        return now_s - self.since_s > RESULTS_S

    @property
    def mostly_broke(self) -> bool:
        """Whether there are enough results and more than half of them failed."""
        return self.ended >= RESULTS_MIN and self.broken > BROKEN_SHARE * self.ended


NO_RESULTS = ResultCounts()


class LatencyOutlier:
    """Whether one measured duration is far above its own baseline at about the same load.

    It is fed with measurements and evaluated once a second. Cost: 0.3 µs an evaluation.
    """

    __slots__ = ("_count", "_load_baseline", "_log_baseline", "_samples", "_slow_in_a_row", "_sum")

    def __init__(self) -> None:
        self._log_baseline = 0.0  # logarithms of seconds: ten times and a tenth weigh the same
        self._load_baseline = 0.0
        self._samples = 0
        self._slow_in_a_row = 0
        self._sum = 0.0
        self._count = 0

    def record(self, duration_s: float) -> None:
        """One measurement."""
        self._sum += log(max(duration_s, 1e-6))
        self._count += 1

    def evaluate(self, in_flight: int) -> bool:
        """Once a second: whether it was far too slow in several seconds in a row, counting those with measurements."""
        if not self._count:
            return False
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        self._samples += 1
        if self._samples <= BASELINE_SAMPLES:
            self._learn(mean, in_flight, 1.0 / self._samples)
            return False
        slow = mean - self._log_baseline > log(SLOW_FACTOR)
        if slow and in_flight <= BUSY_FACTOR * self._load_baseline + BUSY_MORE:
            self._slow_in_a_row += 1
        else:
            self._slow_in_a_row = 0
        self._learn(mean, in_flight, BASELINE_SHARE / 10.0 if slow else BASELINE_SHARE)
        if self._slow_in_a_row < SLOW_SAMPLES:
            return False
        self._slow_in_a_row = 0  # the next report needs new measurements
        return True

    def _learn(self, mean: float, in_flight: int, share: float) -> None:
        self._log_baseline += share * (mean - self._log_baseline)
        self._load_baseline += share * (in_flight - self._load_baseline)


def is_region_lost(ejected_s: Mapping[str, float], members: int, now_s: float) -> bool:
    """Whether so many Endpoints of a region were ejected just now that the region must be the cause.

    Shape: `ejected_s` has the time of the last ejection by Endpoint; `members` counts all Endpoints of the region.
    """
    recent = sum(now_s - moment_s <= REGION_S for moment_s in ejected_s.values())
    return recent >= REGION_MEMBERS and recent >= REGION_SHARE * members
