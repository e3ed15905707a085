"""Warnings to the operator about one worker: a log line and an Event, limited in rate for each kind."""

from collections.abc import Callable

from fleetgate.ipc.event_spool import EventRecord, EventSpool
from fleetgate.ipc.log import Log

LINE_EVERY_S = 1.0
EVENT_EVERY_S = 60.0


class OperatorNotices:
    """One worker's notices."""

    def __init__(self, log: Log, spool: EventSpool, worker: int, clock: Callable[[], float]) -> None:
        self._log = log
        self._spool = spool
        self._worker = worker
        self._clock = clock
        self._emitted_s: dict[tuple[str, str], float] = {}

    def emit(self, kind: str, message: str) -> None:
        """Log a message at most once a second, and emit it as an Event at most once a minute, for each kind."""
        if self._is_due("line", kind, LINE_EVERY_S):
            self._log.warning(kind, message)
        if self._is_due("event", kind, EVENT_EVERY_S):
            self._spool.add(EventRecord("Proxy", f"worker {self._worker}", message))

    def _is_due(self, what: str, kind: str, every_s: float) -> bool:
        now_s = self._clock()
        if now_s - self._emitted_s.get((what, kind), float("-inf")) < every_s:
            return False
        self._emitted_s[what, kind] = now_s
        return True
