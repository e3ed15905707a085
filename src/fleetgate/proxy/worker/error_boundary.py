"""What happens to an internal error: it is counted and logged with its place, and ends only what it happened to.

The entries from the event loop catch it: client connections, attempts, the ticker. What they do not know of, such as an
error while an upstream's bytes are parsed, comes to the loop's exception handler; that connection then ends, which is a
lost attempt like any other. faults.md row 75.
"""

from collections.abc import Callable
from typing import Any

from fleetgate.ipc.log import Log
from fleetgate.proxy.overload.watchdog import stack_summary
from fleetgate.proxy.telemetry.metrics import WorkerMetrics


class ErrorBoundary:
    """One worker's internal errors."""

    def __init__(self, log: Log, metrics: WorkerMetrics) -> None:
        self._log = log
        self._cells = metrics.cells
        self._counter = metrics.counter("fleetgate_internal_errors_total", {})

    def report(self, error: BaseException, request_id: bytes) -> None:
        """Count and log an error. Shape: `request_id` is empty if it is not known.

        The place is logged, not the message: that may hold a prompt or a secret.
        """
        self._cells[self._counter] += 1
        where = stack_summary(error.__traceback__) if error.__traceback__ is not None else "an unknown place"
        self._log.error("internal_error", f"{type(error).__name__} at {where}", id=request_id.decode())

    def run(self, work: Callable[[], None]) -> None:
        """Do what is done again and again, and must go on after an error."""
        try:
            work()
        except Exception as error:
            self.report(error, b"")

    def on_loop_error(self, context: dict[str, Any]) -> None:
        """The loop's exception handler."""
        error = context.get("exception")
        if isinstance(error, Exception):
            self.report(error, b"")
        else:
            self._log.error("loop", str(context.get("message", "")))
