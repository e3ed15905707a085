"""A journal on disks that are full, slow or broken, and a reader that comes late. FAULTS.md rows 68 and 76."""

import asyncio
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from fleetgate.control.store.database import Database
from fleetgate.control.usage import ingest as usage
from fleetgate.control.usage.ingest import UsageIngest
from fleetgate.core import usage_record as account
from fleetgate.ipc import usage_journal as journals
from fleetgate.ipc.usage_journal import UsageJournal
from tests.faults.test_accounts import book_in, count, line, until
from tests.loopback.up_rig import Up, deployment, gateway
from tests.loopback.wall import Wall
from tests.waiting import wait_for


def add(journal: UsageJournal, *numbers: int) -> None:
    for number in numbers:
        journal.add(line("i", number))
        journal.add(line("s", number))


def rows(database: Database) -> list[str]:
    with database.read() as connection:
        return sorted(connection.execute(sa.text("select attempt_id from usage_rows")).scalars())


def segments(folder: Path) -> list[Path]:
    return list(folder.glob("journal/*.0*"))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Disk:
    """What `fdatasync` does, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, does: Callable[[], None]) -> None:
        self.asked = 0
        self._does: Callable[[], None] | None = does
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.asked += 1
        if self._does is not None:
            self._does()
        self._real(fd)

    def mend(self) -> None:
        self._does = None


def test_row_68_what_a_broken_disk_may_have_dropped_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    told: list[str] = []

    async def scene() -> None:
        journal = UsageJournal(tmp_path, told.append)
        journal.begin(asyncio.get_running_loop())
        disk = Disk(monkeypatch, breaks)
        add(journal, 1)
        await until(lambda: journal.is_short)
        add(journal, 2)
        (segment,) = segments(tmp_path)
        with segment.open("r+b") as file:  # the page is gone and what the disk had is read instead
            file.write(b"\0" * 4096)
        journal.check(time.monotonic() + 5)
        await until(lambda: disk.asked == 2)
        await asyncio.sleep(0.05)
        assert journal.is_short, "the disk is still broken"
        disk.mend()
        journal.check(time.monotonic() + 10)
        await until(lambda: not journal.is_short)
        add(journal, 3)
        before = disk.asked
        await until(lambda: disk.asked > before)
        assert journal.lost == 0 and len(segments(tmp_path)) == 1, "no file for each attempt"
        journal.close()

    asyncio.run(scene())
    assert len(told) == 1 and os.strerror(errno.EIO) in told[0]
    book, database = book_in(tmp_path)
    book.take()
    assert rows(database) == ["r-1", "r-2", "r-3"]


def test_row_68_a_disk_that_hangs_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go on being written at once; neither threads nor descriptors pile up."""
    gate = threading.Event()

    def hangs() -> None:
        gate.wait(30)

    async def scene() -> None:
        journal = UsageJournal(tmp_path, lambda sentence: None)
        journal.begin(asyncio.get_running_loop())
        disk = Disk(monkeypatch, hangs)
        before = descriptors()
        for number in range(60):
            add(journal, number)
            await asyncio.sleep(0.006)
        assert disk.asked == 1 and descriptors() <= before + 2
        assert not journal.is_short
        gate.set()
        disk.mend()
        await until(lambda: disk.asked == 2)  # what came meanwhile, all at once
        await asyncio.sleep(0.05)
        assert disk.asked == 2, "nothing new, nothing asked"
        journal.close()

    asyncio.run(scene())
    book, _ = book_in(tmp_path)
    assert book.take() == 60


def test_a_segment_that_is_full_just_as_it_is_to_be_committed_ends_no_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = journals._Segment.at
    closed: list[object] = []

    def at(segment: journals._Segment) -> int:
        if threading.current_thread().name == "journal" and not closed:
            closed.append(segment)
            raise ValueError("mmap closed or invalid")
        return int(real.__get__(segment))

    async def scene() -> None:
        monkeypatch.setattr(journals._Segment, "at", property(at))
        journal = UsageJournal(tmp_path, lambda sentence: None)
        journal.begin(asyncio.get_running_loop())
        disk = Disk(monkeypatch, lambda: None)
        add(journal, 1)
        await until(lambda: bool(closed))
        add(journal, 2)
        await until(lambda: disk.asked == 1)
        journal.close()

    asyncio.run(scene())


def test_row_68_journals_leave_room_for_the_store_that_takes_them_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = os.statvfs(tmp_path)
    monkeypatch.setattr(journals, "FREE_BYTES_MIN", room.f_bavail * room.f_frsize + 1)
    told: list[str] = []

    async def scene() -> None:
        journal = UsageJournal(tmp_path, told.append)
        journal.begin(asyncio.get_running_loop())
        add(journal, 1)
        assert journal.is_short and not segments(tmp_path)
        monkeypatch.setattr(journals, "FREE_BYTES_MIN", 0)
        journal.check(time.monotonic() + 5)
        await until(lambda: not journal.is_short)
        journal.close()

    asyncio.run(scene())
    assert len(told) == 1 and os.strerror(errno.ENOSPC) in told[0]
    book, _ = book_in(tmp_path)
    assert book.take() == 1


def test_row_68_a_fleet_whose_disk_takes_no_accounts_serves_on_and_says_so(tmp_path: Path) -> None:
    """A file stands where the journals' directory should be, then it is taken away."""
    obstacle = tmp_path / "data" / "journal"
    obstacle.parent.mkdir()
    obstacle.write_text("in the way")
    with Wall() as wall:
        documents = [deployment("a", f"http://127.0.0.1:{wall.port}/v1", models=[{"name": "ok"}]), gateway("chat", "a")]
        with Up(tmp_path, documents, "--auth", "none") as up:
            ids = [up.ask(model="ok").headers["x-request-id"] for _ in range(20)]
            wait_for(lambda: degraded(up))
            assert up.is_ready()
            metrics = httpx2.get(f"{up.api}/metrics", trust_env=False, timeout=10).text
            assert 'what="journal",worker="0"} 1.0' in metrics or 'worker="0",what="journal"} 1.0' in metrics
            assert "fleetgate_journal_rows_lost_total 0.0" in metrics and "fleetgate_journal_bytes 0.0" in metrics
            obstacle.unlink()
            engine = sa.create_engine(f"sqlite:///{up.data_dir / 'fleetgate.db'}")
            with engine.connect() as connection:
                query = sa.text("select attempt_id from usage_rows")
                wait_for(lambda: len(connection.execute(query).all()) == 20)
                assert {row.attempt_id for row in connection.execute(query)} == {f"{each}-1" for each in ids}
            engine.dispose()
            wait_for(lambda: not degraded(up))


def degraded(up: Up) -> bool:
    return "usage rows in memory" in httpx2.get(f"{up.api}/readyz", trust_env=False, timeout=10).text


def test_row_76_a_worker_that_is_just_starting_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The book looks at each moment of a journal's first steps; later it must find what is written then."""
    book, database = book_in(tmp_path)
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if how == fcntl.LOCK_EX:  # the worker's own, not the book's try
            book.take()
        real(fd, how)
        if how == fcntl.LOCK_EX:
            book.take()

    async def scene() -> None:
        journal = UsageJournal(tmp_path, lambda sentence: None)
        monkeypatch.setattr(fcntl, "flock", flock)
        journal.begin(asyncio.get_running_loop())
        monkeypatch.setattr(fcntl, "flock", real)
        book.take()
        book.take()
        add(journal, *range(50))
        book.take()
        add(journal, *range(50, 100))
        book.take()
        assert count(database) == 100
        journal.close()

    asyncio.run(scene())


def test_row_76_a_reader_that_was_long_away_reads_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than so much at once, with restarts in between, of a living worker and of dead ones."""
    monkeypatch.setattr(usage, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(usage, "CHUNK_BYTES_MIN", 1000)
    monkeypatch.setattr(journals, "SEGMENT_BYTES", 50_000)
    monkeypatch.setattr(journals, "PREPARE_AT", 25_000)
    sizes: list[int] = []
    real = account.read_entries

    def measured(data: bytes, is_over: bool) -> object:
        sizes.append(len(data))
        return real(data, is_over)

    monkeypatch.setattr(usage, "read_entries", measured)

    async def write(first: int, end: bool) -> UsageJournal:
        journal = UsageJournal(tmp_path, lambda sentence: None)
        journal.begin(asyncio.get_running_loop())
        for number in range(first, first + 500):
            add(journal, number)
            await asyncio.sleep(0.001 if number % 50 == 0 else 0)
        await until(lambda: not journal.is_short)
        if end:
            journal.close()
        return journal

    async def scene() -> None:
        await write(0, True)
        await write(1000, True)
        living = await write(2000, False)
        book, database = book_in(tmp_path)
        for _ in range(5):
            book._take_chunk()
            book = UsageIngest(tmp_path, database)  # it is killed after each of these
        book.take()
        assert count(database) == 1500 and max(sizes) <= 10_000 and len(sizes) > 20
        living.close()
        book.take()
        assert count(database) == 1500 and not list((tmp_path / "journal").iterdir())

    asyncio.run(scene())
