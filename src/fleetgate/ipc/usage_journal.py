"""A worker's journal of attempts, written to memory-mapped files, so that rows outlive the process that wrote them.

To write a row is to copy it into a mapped segment, 0.4 µs; from then on `kill -9` of this process does not lose it. At
most 5 ms later a thread syncs it to the disk, so that a crash of the machine does not lose it either. A full or broken
disk stops no request: rows wait in a bounded buffer, and rows that do not fit are counted. A slow disk gets one sync at
a time.
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
BUFFER_BYTES_MAX = 8 * 1024 * 1024
FREE_BYTES_MIN = 16 * 1024 * 1024  # kept free for the store on the same disk, which takes the rows in
COMMIT_S = 0.005
RETRY_S = 1.0
REPORT_EVERY_S = 10.0
PREPARE_AT = SEGMENT_BYTES // 2  # a thread makes the next segment, because a full or slow disk may block


class _Segment:
    """One file of a journal. Its full length is allocated first, so a disk that fills up later still takes all rows."""

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
        weakref.finalize(self, os.close, self.fd)  # only when no thread uses it any more
        self.synced = 0  # bytes

    @property
    def at(self) -> int:
        """Where the next row goes, in bytes."""
        return self.map.tell()

    def unsynced_rows(self) -> list[bytes]:
        """Return the rows that the disk has not confirmed."""
        return self.map[self.synced : self.at].splitlines(keepends=True)

    def close(self) -> None:
        """Unmap the file; it stays on disk."""
        self.map.close()


class UsageJournal:
    """Appends rows to files named after this process. A lock file, which the kernel unlocks, shows that it runs."""

    def __init__(self, data_dir: Path, on_trouble: Callable[[str], None]) -> None:
        self._directory = data_dir / JOURNAL
        self._run = f"{time.time_ns():020d}-{os.getpid()}"
        self._on_trouble = on_trouble
        self._number = 0
        self._segment: _Segment | None = None
        self._write: Callable[[bytes], int] = _no_segment  # `write` of the segment in use
        self._next: _Segment | None = None
        self._failed: _Segment | None = None  # its sync failed; its unsynced rows are in the buffer too
        self._preparing = False
        self._retrying = False  # a sync of the failed segment is running
        self._sync_due = threading.Event()
        self._is_sync_due = False  # a copy for the event loop, because it is cheaper to read
        self._closed = False
        self._buffer: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._tried_s = self._reported_s = float("-inf")
        self._lock_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self.lost = 0  # rows dropped because the buffer was full

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Open the first segment. Only this call waits for the disk."""
        self._loop = loop
        threading.Thread(target=self._commit_forever, name="journal", daemon=True).start()
        try:
            self._use(self._make())
        except OSError as error:
            self._tried_s = loop.time()
            self._report(error)

    @property
    def is_short(self) -> bool:
        """Whether rows wait in memory because the disk refuses them."""
        return self._segment is None

    def add(self, row: bytes) -> None:
        """Write one row, which ends in a line feed. Cost: 0.2 µs."""
        try:
            self._write(row)
        except ValueError:  # the segment is full, or there is none
            self._use_next(row)
            return
        if not self._is_sync_due:
            self._is_sync_due = True
            self._sync_due.set()
            self._prepare_if_due()

    def check(self, now_s: float) -> None:
        """Retry a disk that failed. To be called once a second."""
        if self._segment is None and not self._retrying and now_s - self._tried_s >= RETRY_S:
            self._tried_s = now_s
            if self._failed is not None:
                self._retrying = True
                self._sync(self._failed, self._on_retried)
            else:
                self._prepare()

    def close(self) -> None:
        """Close the segments; the files stay for the control process, which takes the rows in."""
        for segment in (self._segment, self._next, self._failed):
            if segment is not None:
                segment.close()
        self._next = self._failed = None
        self._use(None)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._closed = True
        self._sync_due.set()

    # --- segments ---

    def _use(self, segment: _Segment | None) -> None:
        self._segment = segment
        self._write = segment.map.write if segment is not None else _no_segment

    def _use_next(self, row: bytes) -> None:
        """Continue in the next segment, or in the buffer until there is one."""
        full = self._segment
        self._use(self._next)
        self._next = None
        if full is not None:
            if full.synced < full.at:
                self._sync(full, self._on_synced)
            full.close()
        if self._segment is not None:
            self.add(row)
            return
        # From here on all rows are buffered, also those that would fit: their order stays.
        self._buffer_row(row)
        if full is not None:
            self._prepare()

    def _buffer_row(self, row: bytes) -> None:
        if self._buffered_bytes + len(row) > BUFFER_BYTES_MAX:
            self.lost += 1
            return
        self._buffer.append(row)
        self._buffered_bytes += len(row)

    def _resume(self, segment: _Segment) -> None:
        """Continue in a segment, first with the buffered rows."""
        self._use(segment)
        rows, self._buffer, self._buffered_bytes = self._buffer, deque(), 0
        for row in rows:
            self.add(row)

    def _prepare_if_due(self) -> None:
        segment, is_late = self._segment, time.monotonic() - self._tried_s >= RETRY_S
        if segment is not None and segment.at > PREPARE_AT and self._next is None and is_late:
            self._prepare()

    def _prepare(self) -> None:
        """Make the next segment in a thread, one at a time; after a failure, `check` retries."""
        assert self._loop is not None
        if not self._preparing:
            self._preparing = True
            self._tried_s = self._loop.time()
            self._loop.run_in_executor(None, self._make).add_done_callback(self._prepared)

    def _make(self) -> _Segment:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._lock_fd < 0:
            # Lock before rename: a process that finds this lock file unlocked concludes that this process is dead.
            name = self._directory / f"{self._run}.lock"
            unnamed = name.with_suffix(".new")
            fd = os.open(unnamed, os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            unnamed.rename(name)
            self._lock_fd = fd
        disk = os.statvfs(self._directory)
        if disk.f_bavail * disk.f_frsize < SEGMENT_BYTES + FREE_BYTES_MIN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._number += 1
        return _Segment(self._directory / f"{self._run}.{self._number:06d}")

    def _prepared(self, made: asyncio.Future[_Segment]) -> None:
        self._preparing = False
        error = made.exception()
        if isinstance(error, OSError):
            self._report(error)
        elif error is not None:
            raise error
        elif self._segment is not None or self._failed is not None:
            self._next = made.result()
        else:
            self._resume(made.result())

    # --- to the disk ---

    def _commit_forever(self) -> None:
        """Sync what was written, all rows of 5 ms at once. Runs in a thread of its own."""
        while self._sync_due.wait() and not self._closed:
            self._sync_due.clear()
            time.sleep(COMMIT_S)
            self._is_sync_due = False  # a row written from here on asks for the next sync
            segment = self._segment
            if segment is None:
                continue
            try:
                at = segment.at
                os.fdatasync(segment.fd)
                segment.synced = at
            except ValueError:  # it was full just now, and `_use_next`, which closed it, has started its sync
                pass
            except OSError as error:
                assert self._loop is not None
                with suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._on_sync_failed, segment, error)
            del segment

    def _on_sync_failed(self, segment: _Segment, error: OSError) -> None:
        """Write unsynced rows again: after a failed sync the kernel may drop them, even if the next sync succeeds."""
        self._report(error)
        if segment is self._segment:
            self._use(None)
            self._failed = segment
            for row in segment.unsynced_rows():
                self._buffer_row(row)

    def _on_retried(self, segment: _Segment, error: BaseException | None) -> None:
        self._retrying = False
        if error is None and segment is self._failed:
            self._failed, segment.synced = None, segment.at
            self._resume(segment)
        self._on_synced(segment, error)

    def _on_synced(self, segment: _Segment, error: BaseException | None) -> None:
        if isinstance(error, OSError):
            self._report(error)
        elif error is not None:
            raise error

    def _sync(self, segment: _Segment, on_done: Callable[[_Segment, BaseException | None], None]) -> None:
        """Sync a segment that is no longer written, in a thread."""
        assert self._loop is not None
        done = self._loop.run_in_executor(None, os.fdatasync, segment.fd)
        done.add_done_callback(lambda ended: on_done(segment, ended.exception()))

    def _report(self, error: OSError) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < REPORT_EVERY_S:
            return
        self._reported_s = now_s
        self._on_trouble(
            f"the journal in {self._directory} cannot be written ({error.strerror}) and usage rows wait in memory; "
            "free space there or repair the disk"
        )


def _no_segment(row: bytes) -> int:
    raise ValueError("no segment is open")
