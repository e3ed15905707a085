"""Writes lines to a file: requests collect them, the tick passes them to a writer thread, dropped ones are counted."""

import os
from pathlib import Path

from fleetgate.ipc.log import LineWriter, Log
from fleetgate.proxy.telemetry.metrics import WorkerMetrics

BACKLOG_BYTES_MAX = 64 * 1024 * 1024  # a minute of 3,000 requests per second
STDOUT = 1


class LineLog:
    """Writes whole lines to a file, pipe or terminal; a slow reader never delays a request.

    Shape: `target` is a path, `-` for standard output or `off`. Lines beyond the backlog are dropped and counted.
    Raises: `OSError` when the file cannot be opened.
    Cost: 0.4 µs a line.
    """

    def __init__(self, target: str) -> None:
        self.on = target != "off"
        self._pending: list[bytes] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        fd = -1 if not self.on else STDOUT if target == "-" else os.open(Path(target), flags, 0o640)
        self._writer = LineWriter(fd, BACKLOG_BYTES_MAX)

    @property
    def dropped(self) -> int:
        """Lines that were not written."""
        return self._writer.dropped

    def add(self, line: bytes) -> None:
        """Collect one line, with its line end, for the next `flush`."""
        if self.on:
            self._pending.append(line)

    def flush(self) -> None:
        """Pass the collected lines to the writer. Called by the tick, not by a request."""
        if self._pending:
            lines, self._pending = self._pending, []
            self._writer.write(b"".join(lines))

    def close(self) -> None:
        """Write the remaining lines; wait at most a second."""
        self.flush()
        self._writer.drain()


class DroppedLines:
    """Counts the lines that this worker's logs dropped."""

    def __init__(self, metrics: WorkerMetrics, logs: dict[str, LineLog | Log]) -> None:
        self._cells = metrics.cells
        self._logs = [
            (log, metrics.counter("fleetgate_log_lines_dropped_total", {"log": name})) for name, log in logs.items()
        ]
        self._counted = [0] * len(self._logs)

    def publish(self) -> None:
        """Add what was dropped since the last call. Called once a second."""
        for at, (log, cell) in enumerate(self._logs):
            dropped = log.dropped
            self._cells[cell] += dropped - self._counted[at]
            self._counted[at] = dropped
