"""Counters and histograms as integers in shared memory."""

from fleetgate.ipc.exposition import series_name
from fleetgate.ipc.metrics_table import OCTAVE_PARTS, bound_label, metric_of, other_labels, step_of
from fleetgate.ipc.shared_memory import SERIES_MAX, SERIES_NAMES_BYTES, SharedMemory, WorkerCell

_BITS = 64  # microseconds of 292,000 years
# Kept free for label sets with the resource name "other": three histograms of 78 buckets and about 150 counters.
OTHER_SERIES = 512
_OTHER_BYTES = OTHER_SERIES * 128


class WorkerMetrics:
    """One worker's column of named integers.

    A restarted worker continues the counts of its predecessor. When the column is nearly full, new label sets are
    counted under the resource name "other".
    """

    def __init__(self, shared_memory: SharedMemory, worker: int) -> None:
        self.cells = shared_memory.series
        self._shared_memory = shared_memory
        self._worker = worker
        self._known = {name: index for name, index in shared_memory.series_of(worker)}
        self.overflow = self._own_cell("fleetgate_series_overflow_total", reserved=True)

    def counter(self, name: str, labels: dict[str, str]) -> int:
        """The index in `cells` to add to.

        Raises: `ValueError` if the metrics table has no such metric with these labels.
        """
        metric_of(name, labels)
        return self.cell(name, labels)

    def add(self, name: str, labels: dict[str, str]) -> None:
        """Count a rare event by name. Cost: 2 µs."""
        self.cells[self.counter(name, labels)] += 1

    def histogram(self, name: str, labels: dict[str, str]) -> "LatencyHistogram":
        """A histogram of durations; a bucket gets its cell at its first observation.

        Raises: `ValueError` if the metrics table has no such metric with these labels.
        """
        metric_of(name, labels)
        return LatencyHistogram(self, name, labels)

    def cell(self, series: str, labels: dict[str, str]) -> int:
        """The index of a series by its exposed name, of its "other" label set if the column is full."""
        full_name = series_name(series, labels)
        index = self._known.get(full_name)
        if index is None:
            other = series_name(series, other_labels(labels))
            index = self._own_cell(full_name, reserved=full_name == other)
            if index < 0:
                self.cells[self.overflow] += 1
                index = self._own_cell(other, reserved=True)
            self._known[full_name] = index = index if index >= 0 else self.overflow
        return index

    def is_full(self) -> bool:
        """Whether new label sets are counted as "other"."""
        count = self._shared_memory.get(self._worker, WorkerCell.SERIES_COUNT)
        used = self._shared_memory.get(self._worker, WorkerCell.NAMES_BYTES)
        return count >= SERIES_MAX - OTHER_SERIES or used >= SERIES_NAMES_BYTES - _OTHER_BYTES

    def _own_cell(self, full_name: str, reserved: bool = False) -> int:
        index = self._known.get(full_name)
        if index is None:
            if not reserved and self.is_full():
                return -1
            index = self._shared_memory.add_series(self._worker, full_name)
            if index >= 0:
                self._known[full_name] = index
        return index


class LatencyHistogram:
    """Durations in four buckets per octave. Cost: 0.2 µs per observation."""

    __slots__ = ("_buckets", "_cells", "_labels", "_metrics", "_name", "_sum")

    def __init__(self, metrics: WorkerMetrics, name: str, labels: dict[str, str]) -> None:
        self._metrics = metrics
        self._cells = metrics.cells
        self._name = name
        self._labels = labels
        # By bit length and part of the octave, so that an observation need not test for the first and the last bound.
        self._buckets = [-1] * (4 * (_BITS + 1))
        self._sum = -1

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        duration_us = int(duration_s * 1e6)
        bits = duration_us.bit_length()
        part = OCTAVE_PARTS[(duration_us << 7) >> bits]
        index = self._buckets[4 * bits + part]
        if index < 0:
            index = self._make(bits, part)
        self._cells[index] += 1
        self._cells[self._sum] += duration_us

    def _make(self, bits: int, part: int) -> int:
        if self._metrics.is_full() and self._labels != (other := other_labels(self._labels)):
            # All further observations go there, so that the sum and the buckets of either label set agree.
            self._labels = other
            self._cells[self._metrics.overflow] += 1
            self._buckets = [-1] * len(self._buckets)
            self._sum = -1
        if self._sum < 0:
            self._sum = self._metrics.cell(f"{self._name}_sum", self._labels)
        le = bound_label(step_of(bits, part))
        index = self._metrics.cell(f"{self._name}_bucket", {**self._labels, "le": le})
        self._buckets[4 * bits + part] = index
        return index
