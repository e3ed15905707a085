"""Services of the worker's process: request ids and background tasks."""

import asyncio
import os
import time
from collections.abc import Coroutine, Iterator
from itertools import count


def request_ids() -> Iterator[bytes]:
    """Ids unique over workers, restarts and machines, without a system call or a Python call for each."""
    prefix = b"req_%x%x%b" % (time.time_ns() // 1_000_000, os.getpid(), os.urandom(3).hex().encode())
    return map((prefix + b"%08x").__mod__, count(1))


class Tasks:
    """Tasks beside the loop's callbacks. The loop keeps only weak references, so they are kept here."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a coroutine."""
        task = self._loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
