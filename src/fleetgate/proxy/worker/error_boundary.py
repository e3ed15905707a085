"""Counts and logs internal errors. Each ends only the request or connection that it happened in.

The functions that the event loop calls catch it: client connections, attempts, the ticker. An error outside of them
reaches the loop's exception handler; the connection then ends. faults.md row 75.
"""

from collections.abc import Callable
from typing import Any

from fleetgate.ipc.log import Log
from fleetgate.proxy.overload.watchdog import stack_summary
from fleetgate.proxy.telemetry.metrics import WorkerMetrics


class ErrorBoundary:
    """Reports the internal errors of one worker."""

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
        """Run one round of periodic work; an error is reported and does not end the period."""
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
