"""Events on their way to the control process. They wait in a file, so that it need not run when they are added."""

import fcntl
import os
import time
from collections import deque
from pathlib import Path

import msgspec

SPOOL = "events.spool"
PENDING_MAX = 100
LOCK_TRIES = 10
LOCK_PAUSE_S = 0.0005  # a holder keeps the lock for 20 µs
BYTES_MAX = 1024 * 1024  # while the control process is away; later Events are dropped, to spare the disk


class EventRecord(msgspec.Struct, frozen=True):
    """An Event of one resource. Shape: `message` is one sentence."""

    kind: str
    name: str
    message: str


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(EventRecord).decode


class EventSpool:
    """Workers and the supervisor add Events; the control process takes them. A lock on the file separates the two.

    `add` waits 5 ms for the lock at most, because a control process that was stopped (SIGSTOP) may hold it.

    Cost: 20 µs to add, so it is for rare Events and not for one in each request.
    """

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / SPOOL
        self._pending: deque[bytes] = deque(maxlen=PENDING_MAX)

    def add(self, event: EventRecord) -> None:
        """Add an Event. If the file is locked, it waits in memory for the next call; a full disk drops it."""
        self._pending.append(_encode(event) + b"\n")
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError:
            return
        try:
            if not _try_lock(fd):
                return
            if os.fstat(fd).st_size < BYTES_MAX:
                os.write(fd, b"".join(self._pending))
            self._pending.clear()
        except OSError:
            return
        finally:
            os.close(fd)

    def take(self) -> list[EventRecord]:
        """Return the Events added since the last call, without lines that a crash left incomplete."""
        if not self._path.exists():
            return []
        fd = os.open(self._path, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            data = os.read(fd, BYTES_MAX * 2)
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        events = []
        for line in data.splitlines():
            try:
                events.append(_decode(line))
            except msgspec.DecodeError:
                continue
        return events


def _try_lock(fd: int) -> bool:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return True
    return False
