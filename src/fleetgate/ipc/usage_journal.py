"""A worker's journal of attempts: memory that is a file, so that what was written outlives the process that wrote it.

A row is a copy into a mapped segment, 0.4 µs; from then on `kill -9` of this process loses nothing. At most 5 ms later
a thread asks the disk to take it, for the machine's own end. A disk that is full or broken stops no request: rows wait
in memory, within bounds, and what does not fit is counted. A slow one is asked once at a time.
"""

import asyncio
import errno
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fleetgate.core.usage_record import JOURNAL

SEGMENT_BYTES = 4 * 1024 * 1024
HELD_BYTES_MAX = 8 * 1024 * 1024
LEFT_BYTES_MIN = 16 * 1024 * 1024  # journals end here: to take them in, the store needs room on the same disk
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
        weakref.finalize(self, os.close, self.fd)  # once no thread uses it any more
        self.on_disk = 0

    @property
    def at(self) -> int:
        """Where the next row goes."""
        return self.map.tell()

    def not_on_disk(self) -> list[bytes]:
        """The rows of which the disk has not said that it has them."""
        return self.map[self.on_disk : self.at].splitlines(keepends=True)

    def close(self) -> None:
        """The file stays."""
        self.map.close()


class UsageJournal:
    """Append-only. A process's own name is in its files' names; a lock that dies with it tells others that it lives."""

    def __init__(self, data_dir: Path, on_trouble: Callable[[str], None]) -> None:
        self._directory = data_dir / JOURNAL
        self._run = f"{time.time_ns():020d}-{os.getpid()}"
        self._on_trouble = on_trouble
        self._number = 0
        self._segment: _Segment | None = None
        self._write: Callable[[bytes], int] = _nowhere  # of the segment in use
        self._next: _Segment | None = None
        self._doubted: _Segment | None = None  # the disk did not take it; what it may not have is held in memory too
        self._preparing = False
        self._asking = False  # the doubted one is being asked for again
        self._due = threading.Event()  # rows wait for the disk
        self._is_due = False  # the same, for the loop's own eyes: rows come much oftener than commits
        self._closed = False
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._tried_s = self._said_s = float("-inf")
        self._lock_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0  # rows that found no room anywhere

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the first segment; it waits for the disk this once."""
        self._loop = loop
        threading.Thread(target=self._commit_forever, name="journal", daemon=True).start()
        try:
            self._use(self._make())
        except OSError as error:
            self._tried_s = loop.time()
            self._say(error)

    @property
    def is_short(self) -> bool:
        """Whether rows wait in memory because the disk does not take them."""
        return self._segment is None

    def add(self, row: bytes) -> None:
        """Write one row, which ends in a line feed. Cost: 0.2 µs."""
        try:
            self._write(row)
        except ValueError:  # its segment has no room left, or there is none
            self._turn(row)
            return
        if not self._is_due:
            self._is_due = True
            self._due.set()
            self._perhaps_prepare()

    def check(self, now_s: float) -> None:
        """Once a second: try the disk again where it failed."""
        if self._segment is None and not self._asking and now_s - self._tried_s >= RETRY_S:
            self._tried_s = now_s
            if self._doubted is not None:
                self._asking = True
                self._sync(self._doubted, self._asked_again)
            else:
                self._prepare()

    def close(self) -> None:
        """The last rows; the files stay for whoever takes them in."""
        for segment in (self._segment, self._next, self._doubted):
            if segment is not None:
                segment.close()
        self._next = self._doubted = None
        self._use(None)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._closed = True
        self._due.set()

    # --- segments ---

    def _use(self, segment: _Segment | None) -> None:
        self._segment = segment
        self._write = segment.map.write if segment is not None else _nowhere

    def _turn(self, row: bytes) -> None:
        """The segment is full: go on in the next one, or in memory until there is one."""
        full = self._segment
        self._use(self._next)
        self._next = None
        if full is not None:
            if full.on_disk < full.at:
                self._sync(full, self._saw)
            full.close()
        if self._segment is not None:
            self.add(row)
            return
        # From here on all rows are held, the short ones too: they stay in their order.
        self._hold(row)
        if full is not None:
            self._prepare()

    def _hold(self, row: bytes) -> None:
        if self._held_bytes + len(row) > HELD_BYTES_MAX:
            self.lost += 1
            return
        self._held.append(row)
        self._held_bytes += len(row)

    def _go_on(self, segment: _Segment) -> None:
        """The disk takes rows again: first those that waited."""
        self._use(segment)
        held, self._held, self._held_bytes = self._held, deque(), 0
        for row in held:
            self.add(row)

    def _perhaps_prepare(self) -> None:
        segment, is_late = self._segment, time.monotonic() - self._tried_s >= RETRY_S
        if segment is not None and segment.at > PREPARE_AT and self._next is None and is_late:
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
            # The name is given to what is locked already: who finds a lock free may take its holder for dead.
            name = self._directory / f"{self._run}.lock"
            unnamed = name.with_suffix(".new")
            fd = os.open(unnamed, os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            unnamed.rename(name)
            self._lock_fd = fd
        room = os.statvfs(self._directory)
        if room.f_bavail * room.f_frsize < SEGMENT_BYTES + LEFT_BYTES_MIN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._number += 1
        return _Segment(self._directory / f"{self._run}.{self._number:06d}")

    def _prepared(self, made: asyncio.Future[_Segment]) -> None:
        self._preparing = False
        error = made.exception()
        if isinstance(error, OSError):
            self._say(error)
        elif error is not None:
            raise error
        elif self._segment is not None or self._doubted is not None:
            self._next = made.result()
        else:
            self._go_on(made.result())

    # --- to the disk ---

    def _commit_forever(self) -> None:
        """In a thread of its own: the disk is asked to take what was written, all of 5 ms together."""
        while self._due.wait() and not self._closed:
            self._due.clear()
            time.sleep(COMMIT_S)
            self._is_due = False  # whoever writes from here on asks anew
            segment = self._segment
            if segment is None:
                continue
            try:
                at = segment.at
                os.fdatasync(segment.fd)
                segment.on_disk = at
            except ValueError:  # it was full just now, and `_turn`, which closed it, has asked for it
                pass
            except OSError as error:
                assert self._loop is not None
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._doubt, segment, error)
            del segment

    def _doubt(self, segment: _Segment, error: OSError) -> None:
        """What the disk did not take once it may drop, however well the next attempt goes."""
        self._say(error)
        if segment is self._segment:
            self._use(None)
            self._doubted = segment
            for row in segment.not_on_disk():
                self._hold(row)

    def _asked_again(self, segment: _Segment, error: BaseException | None) -> None:
        self._asking = False
        if error is None and segment is self._doubted:
            self._doubted, segment.on_disk = None, segment.at
            self._go_on(segment)
        self._saw(segment, error)

    def _saw(self, segment: _Segment, error: BaseException | None) -> None:
        if isinstance(error, OSError):
            self._say(error)
        elif error is not None:
            raise error

    def _sync(self, segment: _Segment, then: Callable[[_Segment, BaseException | None], None]) -> None:
        """Bring a segment that nobody writes to the disk, beside the one in use."""
        assert self._loop is not None
        done = self._loop.run_in_executor(None, os.fdatasync, segment.fd)
        done.add_done_callback(lambda ended: then(segment, ended.exception()))

    def _say(self, error: OSError) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s < SAY_EVERY_S:
            return
        self._said_s = now_s
        self._on_trouble(f"the journal in {self._directory} cannot be written ({error.strerror}); make room there")


def _nowhere(row: bytes) -> int:
    raise ValueError("there is no segment")
