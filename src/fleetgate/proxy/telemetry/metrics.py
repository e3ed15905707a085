"""Counters and histograms as integers in shared memory, and the access log as bytes: what a request can afford."""

import os
import queue
import threading
from pathlib import Path

from fleetgate.ipc.shared_memory import BUCKET_FIRST_BIT, BUCKET_LAST_BIT, SharedMemory, bucket_bound

_BITS = 64  # microseconds of 292,000 years
LOG_BACKLOG_BLOCKS_MAX = 1_200  # one a sweep: a minute


def series_name(name: str, labels: dict[str, str]) -> str:
    """The exposition name. Label values come from resources and enums, never from a request."""
    if not labels:
        return name
    parts = (f'{key}="{_escape(value)}"' for key, value in labels.items())
    return f"{name}{{{','.join(parts)}}}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class WorkerMetrics:
    """One worker's column of named integers.

    A worker that is started again goes on with the counts of the one before it.
    """

    def __init__(self, board: SharedMemory, worker: int) -> None:
        self.cells = board.series
        self._board = board
        self._worker = worker
        self._known = {name: index for name, index in board.series_of(worker)}
        self._spare = self.counter("fleetgate_series_overflow_total", {})

    def counter(self, name: str, labels: dict[str, str]) -> int:
        """The index in `cells` to add to; the overflow counter's when there is no room for another series."""
        return self._cell(series_name(name, labels))

    def add(self, name: str, labels: dict[str, str]) -> None:
        """Count something rare by name. Cost: 2 µs."""
        self.cells[self.counter(name, labels)] += 1

    def histogram(self, name: str, labels: dict[str, str]) -> "LatencyHistogram":
        """A histogram of durations; its cells are made at its first observation of each bucket."""
        return LatencyHistogram(self, name, labels)

    def _cell(self, full_name: str) -> int:
        index = self._known.get(full_name)
        if index is None:
            index = self._board.add_series(self._worker, full_name)
            if index < 0:
                return self._spare
            self._known[full_name] = index
        return index


class LatencyHistogram:
    """Durations in buckets of powers of two. Cost: 0.2 µs an observation."""

    __slots__ = ("_buckets", "_cells", "_labels", "_name", "_sum", "_telemetry")

    def __init__(self, telemetry: WorkerMetrics, name: str, labels: dict[str, str]) -> None:
        self._telemetry = telemetry
        self._cells = telemetry.cells
        self._name = name
        self._labels = labels
        self._buckets = [-1] * _BITS  # by bit length, so that an observation need not ask for the first and last
        self._sum = -1

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        duration_us = int(duration_s * 1e6)
        bits = duration_us.bit_length()
        index = self._buckets[bits]
        if index < 0:
            index = self._make(bits)
        self._cells[index] += 1
        self._cells[self._sum] += duration_us

    def _make(self, bits: int) -> int:
        bit = min(max(bits, BUCKET_FIRST_BIT), BUCKET_LAST_BIT + 1)
        index = self._telemetry.counter(f"{self._name}_bucket", {**self._labels, "le": bucket_bound(bit)})
        self._buckets[bits] = index
        if self._sum < 0:
            self._sum = self._telemetry.counter(f"{self._name}_sum", self._labels)
        return index


class TokenEstimateError:
    """How far token estimates are off. Shape: `kind` is `prompt` or `output`."""

    __slots__ = ("_cells", "_error", "_estimated")

    def __init__(self, telemetry: WorkerMetrics, kind: str) -> None:
        self._cells = telemetry.cells
        self._estimated = telemetry.counter("fleetgate_estimated_tokens_total", {"kind": kind})
        self._error = telemetry.counter("fleetgate_token_error_total", {"kind": kind})

    def saw(self, estimated: float, tokens: int) -> None:
        """An engine told how many there were."""
        self._cells[self._estimated] += int(estimated)
        self._cells[self._error] += int(abs(estimated - tokens))


class LineLog:
    """Writes whole lines to a file, pipe or terminal from a thread, so that a slow reader never holds up a request.

    Shape: `target` is a path, `-` for standard output or `off`. Lines past the backlog are dropped and counted.
    Raises: `OSError` when the file cannot be opened.
    """

    def __init__(self, target: str) -> None:
        self.dropped = 0
        self.on = target != "off"
        self._pending: list[bytes] = []
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        if not self.on:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._fd = 1 if target == "-" else os.open(Path(target), flags, 0o640)
        self._thread = threading.Thread(target=self._write_all, name="line-log", daemon=True)
        self._thread.start()

    def add(self, line: bytes) -> None:
        """Keep one line, with its line end, for the next `flush`."""
        if self.on:
            self._pending.append(line)

    def flush(self) -> None:
        """Hand what was kept to the writer. Called by the sweep, not by a request."""
        if not self._pending:
            return
        lines, self._pending = self._pending, []
        if self._queue.qsize() >= LOG_BACKLOG_BLOCKS_MAX:
            self.dropped += len(lines)
            return
        self._queue.put(b"".join(lines))

    def close(self) -> None:
        """Write what is left, and wait for it a moment."""
        if self.on:
            self.flush()
            self._queue.put(None)
            self._thread.join(timeout=1.0)

    def _write_all(self) -> None:
        while (block := self._queue.get()) is not None:
            try:
                view = memoryview(block)
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError:  # disk full or the reader is gone: logs are dropped first, traffic goes on
                self.dropped += block.count(b"\n")
