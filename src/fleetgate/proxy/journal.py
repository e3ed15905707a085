"""A worker's journal of attempts: memory that is a file, so that what was written outlives the process that wrote it.

A row is a copy into a mapped segment, 0.3 µs; from then on `kill -9` of this process loses nothing. At most 5 ms later
a thread brings it to the disk, for the machine's own end. A disk that is full or broken stops no request: rows wait in
memory, within bounds, and what does not fit is counted.
"""

import asyncio
import fcntl
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

JOURNAL = "journal"
SEGMENT_BYTES = 4 * 1024 * 1024
HELD_BYTES_MAX = 8 * 1024 * 1024
COMMIT_S = 0.005
RETRY_S = 1.0
SAY_EVERY_S = 10.0
PREPARE_AT = SEGMENT_BYTES // 2  # the next segment is made in a thread, because a full or slow disk may take its time


class _Segment:
    """One file of a journal, as long from the start as it will ever be: a disk that fills up later takes it whole."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(self.fd, 0, SEGMENT_BYTES)
            self.map = mmap.mmap(self.fd, SEGMENT_BYTES)
        except OSError:
            os.close(self.fd)
            with suppress(OSError):
                path.unlink()
            raise
        self.at = 0


class Journal:
    """Append-only. `run` names this process's files; a lock that dies with it tells others that it lives."""

    def __init__(self, data_dir: Path, on_trouble: Callable[[str], None]) -> None:
        self._directory = data_dir / JOURNAL
        self._run = f"{time.time_ns():020d}-{os.getpid()}"
        self._on_trouble = on_trouble
        self._number = 0
        self._segment: _Segment | None = None
        self._next: _Segment | None = None
        self._preparing = False
        self._committing = False
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._tried_s = self._said_s = float("-inf")
        self._lock_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0  # rows that found no room anywhere

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the first segment; it waits for the disk this once."""
        self._loop = loop
        self._tried_s = loop.time()
        try:
            self._segment = self._make()
        except OSError as error:
            self._say(error)

    @property
    def is_short(self) -> bool:
        """Whether rows wait in memory because the disk does not take them."""
        return self._segment is None

    def add(self, row: bytes) -> None:
        """Write one row, which ends in a line feed. Cost: 0.4 µs."""
        segment = self._segment
        if segment is None or segment.at + len(row) > SEGMENT_BYTES:
            self._turn(row)
            return
        end = segment.at + len(row)
        segment.map[segment.at : end] = row
        segment.at = end
        if not self._committing:
            self._committing = True
            assert self._loop is not None
            self._loop.call_later(COMMIT_S, self._commit)
            if end > PREPARE_AT and self._next is None:
                self._prepare()

    def look(self, now_s: float) -> None:
        """Once a second: try the disk again where it failed."""
        if self._segment is None and now_s - self._tried_s >= RETRY_S:
            self._prepare()

    def close(self) -> None:
        """The last rows; the files stay for whoever takes them in."""
        self._close(self._segment)
        self._close(self._next)
        self._segment = self._next = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    # --- segments ---

    def _turn(self, row: bytes) -> None:
        """The segment is full: go on in the next one, or in memory until there is one."""
        self._close(self._segment)
        self._segment, self._next = self._next, None
        if self._segment is not None:
            self.add(row)
            return
        # From here on all rows are held, the short ones too: they stay in their order.
        if self._held_bytes + len(row) > HELD_BYTES_MAX:
            self.lost += 1
            return
        self._held.append(row)
        self._held_bytes += len(row)
        if len(self._held) == 1:
            self._prepare()

    def _prepare(self) -> None:
        """Make the next segment in a thread; one at a time, and after a failure `look` is who tries again."""
        assert self._loop is not None
        if not self._preparing:
            self._preparing = True
            self._tried_s = self._loop.time()
            self._loop.run_in_executor(None, self._make).add_done_callback(self._prepared)

    def _make(self) -> _Segment:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._lock_fd < 0:
            self._lock_fd = os.open(self._directory / f"{self._run}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        self._number += 1
        return _Segment(self._directory / f"{self._run}.{self._number:06d}")

    def _prepared(self, made: asyncio.Future[_Segment]) -> None:
        self._preparing = False
        error = made.exception()
        if isinstance(error, OSError):
            self._say(error)
        elif error is not None:
            raise error
        elif self._segment is not None:
            self._next = made.result()
        else:
            self._segment = made.result()
            held, self._held, self._held_bytes = self._held, deque(), 0
            for row in held:
                self.add(row)

    def _close(self, segment: _Segment | None) -> None:
        if segment is not None:
            segment.map.close()
            os.close(segment.fd)  # a commit on its way in a thread has a descriptor of its own

    # --- to the disk ---

    def _commit(self) -> None:
        self._committing = False
        if self._segment is None or self._loop is None:
            return
        self._loop.run_in_executor(None, _sync, os.dup(self._segment.fd)).add_done_callback(self._committed)

    def _committed(self, done: asyncio.Future[None]) -> None:
        error = done.exception()
        if isinstance(error, OSError):
            self._say(error)  # the disk is broken; the rows are in memory, and other processes can read them there
        elif error is not None:
            raise error

    def _say(self, error: OSError) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S:
            return
        self._said_s = now_s
        self._on_trouble(f"the journal in {self._directory} cannot be written ({error.strerror}); make room there")


def _sync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
