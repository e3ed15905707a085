"""Notices that the event loop stands still, and what it is that holds it up. FAULTS.md row 74."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType

LAG_MAX_S = 0.25
LOOK_S = 0.1
FRAMES_MAX = 4  # the innermost ones tell


class Watchdog:
    """A thread looks at the loop's last beat ten times a second and keeps where the loop was when that is too old.

    Shape: made in the loop's thread. `tell` is called there, with the lag and where the loop was, as far as it is
    known: one long call into C holds the thread up too. Cost: 20 µs a look.
    """

    def __init__(self, period_s: float, tell: Callable[[float, str], None]) -> None:
        self._period_s = period_s
        self._tell = tell
        self._thread_id = threading.get_ident()
        self._beat_at_s = time.monotonic()
        self._caught = ""
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self) -> None:
        """The loop goes round."""
        now_s = time.monotonic()
        lag_s = now_s - self._beat_at_s - self._period_s
        self._beat_at_s = now_s
        if lag_s > LAG_MAX_S:
            where, self._caught = self._caught, ""
            self._tell(lag_s, where or "it is not known where, in one long call or while the machine was busy")

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_S):
            beat_at_s = self._beat_at_s
            if time.monotonic() - beat_at_s - self._period_s > LAG_MAX_S:
                frame = sys._current_frames().get(self._thread_id)
                if frame is not None and beat_at_s == self._beat_at_s:
                    self._caught = stack_summary(frame)


def stack_summary(at: FrameType | TracebackType) -> str:
    """The innermost places of a stack, `file:line in function`. No values: they may hold prompts or secrets."""
    stack = traceback.extract_stack(at) if isinstance(at, FrameType) else traceback.extract_tb(at)
    shown = [f"{'/'.join(row.filename.split('/')[-2:])}:{row.lineno} in {row.name}" for row in stack[-FRAMES_MAX:]]
    return ", ".join(reversed(shown))
