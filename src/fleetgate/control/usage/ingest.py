"""Read the workers' journals into the store once a second; a crash of any process counts no attempt twice.

Rows, sums, open attempts and read offsets change in one transaction. A file is deleted when it is read to its end and
its writer has moved to the next file or has died; the writer's lock, which the kernel releases, shows which.
"""

import asyncio
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

import structlog

from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.store import usage
from fleetgate.control.store.database import Database
from fleetgate.core.usage_record import JOURNAL, JournalReplay, OpenAttempt, UsageRow, read_entries

INGEST_EVERY_S = 1.0
PRUNE_EVERY = 600  # transactions
CHUNK_BYTES = 2 * 1024 * 1024  # of journals in one transaction: after a long pause they may exceed the memory
CHUNK_BYTES_MIN = 64 * 1024  # longer than any line
log = structlog.get_logger()


class _Taken(NamedTuple):
    """What was read from the files of one run."""

    run: str
    rows: list[UsageRow]
    changed: list[OpenAttempt]
    settled: list[str]
    offsets: dict[str, int]
    done: list[Path]
    left_bytes: int  # may still be read in the same transaction


class UsageIngest:
    """Reads journals into the store. The lock of the data directory allows only one such process."""

    def __init__(self, data_dir: Path, database: Database) -> None:
        self._directory = data_dir / JOURNAL
        self._database = database
        self._replays: dict[str, JournalReplay] = {}
        self._offsets: dict[str, int] = {}
        self._gone: list[str] = []
        self._takes = 0
        self._loaded = False
        self._lock = threading.Lock()

    async def run(self) -> None:
        """Read once a second until cancelled."""
        last_error = ""
        while True:
            try:
                await asyncio.to_thread(self.take)
                last_error = ""
            except (OSError, DataDirUnusable) as error:  # the journals stay on disk
                self._loaded = False
                if str(error) != last_error:
                    last_error = str(error)
                    log.error("journal_not_taken", reason=last_error)
            await asyncio.sleep(INGEST_EVERY_S)

    def take(self) -> int:
        """Read everything that the journals have now, and return the number of new rows.

        Raises: `OSError`, `DataDirUnusable`; then nothing is lost.
        Cost: 15 µs per row.
        """
        with self._lock:  # the last call of a process may overlap with the previous one
            new, is_more = 0, True
            while is_more:
                taken, is_more = self._take_chunk()
                new += taken
            return new

    def _take_chunk(self) -> tuple[int, bool]:
        """Run one transaction. The result is the number of new rows, and whether there is more to read."""
        if not self._loaded:
            self._load()
        taken: list[_Taken] = []
        left_bytes = CHUNK_BYTES
        for run, paths in self._files().items():
            if left_bytes <= 0:
                break
            taken.append(self._read(run, paths, left_bytes))
            left_bytes = taken[-1].left_bytes
        new = 0
        if any(one.rows or one.changed or one.offsets for one in taken) or self._gone:
            with self._database.write() as connection:
                for one in taken:
                    new += usage.add_rows(connection, one.rows)
                    usage.save_open(connection, one.run, one.changed, one.settled)
                    usage.save_offsets(connection, one.offsets, ())
                usage.save_offsets(connection, {}, self._gone)
                self._takes += 1
                if self._takes % PRUNE_EVERY == 1:
                    usage.prune(connection)
        self._gone = []
        for one in taken:
            self._offsets.update(one.offsets)
            for path in one.done:
                path.unlink(missing_ok=True)
                self._offsets.pop(path.name, None)
                self._gone.append(path.name)
        return new, left_bytes <= 0

    def _load(self) -> None:
        with self._database.read() as connection:
            self._offsets = usage.load_offsets(connection)
            self._replays = {run: JournalReplay(known) for run, known in usage.load_open(connection).items()}
        self._gone = [name for name in self._offsets if not (self._directory / name).exists()]
        self._loaded = True

    def _files(self) -> dict[str, list[Path]]:
        """The files of each run in order, also of runs of which only open attempts are left."""
        found: dict[str, list[Path]] = {run: [] for run in self._replays}
        try:
            names = sorted(path.name for path in self._directory.iterdir())
        except FileNotFoundError:
            names = []
        for name in names:
            run, _, number = name.partition(".")
            if number.isdigit():
                found.setdefault(run, []).append(self._directory / name)
            elif number == "lock":
                found.setdefault(run, [])
        return found

    def _read(self, run: str, paths: list[Path], left_bytes: int) -> _Taken:
        # Check this before reading: a dead worker has then written everything.
        dead = self._is_dead(run)
        replay = self._replays.setdefault(run, JournalReplay())
        before = dict(replay.open_attempts)
        taken = _Taken(run, [], [], [], {}, [], left_bytes)
        for number, path in enumerate(paths):
            # Check this before reading, too. The next file may exist long before it has any content.
            is_over = dead or any(_has_begun(later) for later in paths[number + 1 :])
            at = self._offsets.get(path.name, 0)
            data, is_all = _read_chunk(path, at, max(CHUNK_BYTES_MIN, left_bytes), is_over)
            entries, read, damaged = read_entries(data, is_over)
            if damaged:
                log.warning("journal_damaged", file=path.name, lines=damaged)
            taken.rows.extend(replay.apply(entries))
            left_bytes -= read
            if read and (entries or not is_over or not is_all):
                taken.offsets[path.name] = at + read
            if not is_all:
                left_bytes = 0
                break
            if is_over:
                taken.done.append(path)
        if dead and left_bytes > 0:
            taken.rows.extend(replay.abandon(int(time.time() * 1000)))
            taken.done.append(self._directory / f"{run}.lock")
            del self._replays[run]
        taken.changed.extend(one for name, one in replay.open_attempts.items() if before.get(name) is not one)
        taken.settled.extend(name for name in before if name not in replay.open_attempts)
        return taken._replace(left_bytes=left_bytes)

    def _is_dead(self, run: str) -> bool:
        try:
            fd = os.open(self._directory / f"{run}.lock", os.O_WRONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True


def _has_begun(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) not in (b"", b"\0")


def _read_chunk(path: Path, at: int, most_bytes: int, is_over: bool) -> tuple[bytes, bool]:
    """A chunk of a file that ends between two lines, and whether the file has no more content now."""
    with path.open("rb") as file:
        file.seek(at)
        data = file.read(most_bytes)
        is_all = not file.read(1)
    if is_all or (not is_over and b"\0" in data):
        return data, True
    cut = max(data.rfind(b"\n"), data.rfind(b"\0")) + 1
    return data[: cut or len(data)], False
