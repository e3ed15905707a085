"""Detects a blocked event loop and finds the code that blocks it. faults.md row 74."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType

LAG_MAX_S = 0.25
CHECK_S = 0.1
FRAMES_MAX = 4  # the innermost ones


class Watchdog:
    """A thread that checks the loop's last beat ten times a second and keeps the loop's stack if the beat is too old.

    Shape: made in the loop's thread. `on_lag` is called there with the lag and the stack, if that is known: a long
    call into C can block the watchdog's thread too. Cost: 20 µs a check.
    """

    def __init__(self, period_s: float, on_lag: Callable[[float, str], None]) -> None:
        self._period_s = period_s
        self._on_lag = on_lag
        self._thread_id = threading.get_ident()
        self._beat_at_s = time.monotonic()
        self._blocked_at = ""
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The loop runs; called once a period."""
        now_s = time.monotonic()
        lag_s = now_s - self._beat_at_s - self._period_s
        self._beat_at_s = now_s
        if lag_s > LAG_MAX_S:
            stack, self._blocked_at = self._blocked_at, ""
            self._on_lag(lag_s, stack or "place unknown: one long call, or the machine was busy")

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(CHECK_S):
            beat_at_s = self._beat_at_s
            if time.monotonic() - beat_at_s - self._period_s > LAG_MAX_S:
                frame = sys._current_frames().get(self._thread_id)
                if frame is not None and beat_at_s == self._beat_at_s:
                    self._blocked_at = stack_summary(frame)


def stack_summary(at: FrameType | TracebackType) -> str:
    """The innermost frames of a stack, `file:line in function`. No values: they may hold prompts or secrets."""
    stack = traceback.extract_stack(at) if isinstance(at, FrameType) else traceback.extract_tb(at)
    shown = [f"{'/'.join(row.filename.split('/')[-2:])}:{row.lineno} in {row.name}" for row in stack[-FRAMES_MAX:]]
    return ", ".join(reversed(shown))
