"""Waiting for what is to happen, with limits that even a busy machine keeps."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as it holds. Raises AssertionError when it never does; the limit costs only who fails."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not happen within {timeout_s:.0f} s"
        time.sleep(0.01)
