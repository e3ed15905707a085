"""One row for each attempt, whoever dies: FAULTS.md rows 68, 71, 76, 99."""

import asyncio
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from fleetgate.control.store.database import Database
from fleetgate.control.usage.ingest import UsageIngest
from fleetgate.ipc import usage_journal as journals
from fleetgate.ipc.usage_journal import UsageJournal
from tests.loopback.up_rig import Up, deployment, gateway, kill
from tests.loopback.wall import Wall
from tests.loopback.wall_replies import REPLIES
from tests.waiting import wait_for

CONTROL, WORKER = "fleetgate.control.process", "fleetgate.proxy.worker"
KILLS = int(os.environ.get("FLEETGATE_KILLS", "5"))
MODELS = [{"name": name} for name in REPLIES]
GOOD = ("ok", "at-once", "in-pieces", "slow", "slow")
BAD = ("rst-before", "rst-mid", "clean-end", "truncated-json")  # few, or no engine would be left in use
UNSEEN = ("interrupted", "unreachable", "stale", "client_gone")  # may have ended before an engine saw them


def rows_of(up: Up) -> list[sa.Row[tuple[object, ...]]]:
    """The usage book, read beside the control process."""
    engine = sa.create_engine(f"sqlite:///{up.data_dir / 'fleetgate.db'}")
    try:
        with engine.connect() as connection:
            return list(connection.execute(sa.text("select * from usage_rows order by id")).all())
    finally:
        engine.dispose()


def journal_files(up: Up) -> list[str]:
    return [path.name for path in (up.data_dir / "journal").iterdir()]


class Crowd:
    """Clients that ask, and sometimes leave before their answer is whole."""

    def __init__(self, up: Up, clients: int = 8) -> None:
        self._up = up
        self._stop = threading.Event()
        self.count = 0
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(clients)]

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx2.Client(trust_env=False, timeout=30) as client:
            while not self._stop.is_set():
                body: dict[str, object] = {
                    "model": chance.choice(BAD if chance.random() < 0.06 else GOOD),
                    "messages": [{"role": "user", "content": "hi"}],
                }
                body |= {"stream": chance.random() < 0.6, "temperature": 0, "wall": {"delay_s": 0.5}}
                with suppress(httpx2.HTTPError):
                    url = f"{self._up.url}/chat/completions"
                    with client.stream("POST", url, json=body) as answer:
                        if chance.random() < 0.8:
                            answer.read()
                self.count += 1

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)


def asked_of(walls: list[Wall]) -> Counter[str]:
    """How often each request came to an engine, as the engines saw it."""
    seen = [one for wall in walls for one in wall.seen if one.path.endswith("/chat/completions")]
    return Counter(one.headers["x-request-id"][0] for one in seen if "x-request-id" in one.headers)


def test_rows_71_and_76_every_attempt_has_one_row_whoever_is_killed(tmp_path: Path) -> None:
    """Workers and the control process die by kill -9 under load; then the book is held against what engines saw.

    `FLEETGATE_KILLS=100` is the long form.
    """
    with ExitStack() as stack:
        walls = [stack.enter_context(Wall()) for _ in range(2)]
        documents = [
            deployment(name, f"http://127.0.0.1:{wall.port}/v1", engine="openai", models=MODELS)
            for name, wall in zip("ab", walls, strict=True)
        ]
        up = stack.enter_context(Up(tmp_path, [*documents, gateway("chat", "a", "b")], "--auth", "none"))
        chance = random.Random(7)
        with Crowd(up) as crowd:
            for number in range(KILLS):
                victim = (WORKER, CONTROL)[number % 2]
                before = crowd.count
                wait_for(lambda before=before: crowd.count > before + 60)  # type: ignore[misc]
                time.sleep(chance.random())
                wait_for(lambda victim=victim: bool(up.children(victim)))  # type: ignore[misc]
                kill(chance.choice(up.children(victim)))
            wait_for(lambda: len(up.children(WORKER)) == 2)
            before = crowd.count
            wait_for(lambda: crowd.count > before + 60)
        runs = {name.partition(".")[0] for name in journal_files(up)}
        wait_for(lambda: up.is_ready())
        # All is told once nothing is in flight and only the two living workers have files.
        wait_for(lambda: len({name.partition(".")[0] for name in journal_files(up)}) == 2)
        time.sleep(2.5)
        rows, seen = rows_of(up), asked_of(walls)
    ids = [row.attempt_id for row in rows]
    print(f"{KILLS} kills, {sum(seen.values())} attempts at engines, {len(ids)} rows")
    assert len(ids) == len(set(ids))
    attempts = Counter(name.rpartition("-")[0] for name in ids)
    missing = {name: count for name, count in seen.items() if attempts[name] < count}
    assert not missing, (missing, runs)
    # An attempt that an engine never saw is one that was lost before it got there, or died with its worker.
    unsent = Counter(row.attempt_id.rpartition("-")[0] for row in rows if row.outcome in UNSEEN)
    for name, count in attempts.items():
        assert count - seen[name] <= unsent[name], name
    outcomes = {row.outcome for row in rows}
    assert outcomes >= {"ok", "client_gone", "interrupted"} and outcomes & {"broken", "bad_output"}, outcomes
    # Of all attempts of a request only the last one is billed.
    billed = Counter(row.attempt_id.rpartition("-")[0] for row in rows if row.billed_output_tokens)
    assert billed and max(billed.values()) == 1
    exact = [row for row in rows if row.outcome == "ok" and row.exact]
    assert all(
        (row.billed_prompt_tokens, row.billed_output_tokens) == (row.prompt_tokens, row.output_tokens) for row in exact
    )


def test_row_99_who_leaves_early_is_billed_for_what_came(tmp_path: Path) -> None:
    """The engine tells its tokens only at the end, which nobody waits for: they are counted as they pass."""
    with Wall() as wall:
        documents = [deployment("a", f"http://127.0.0.1:{wall.port}/v1", models=MODELS)]
        with Up(tmp_path, [*documents, gateway("chat", "a")], "--auth", "none") as up:
            body = {"model": "late-end", "messages": [{"role": "user", "content": "hi"}], "stream": True}
            got = 0
            for _ in range(20):
                with httpx2.stream("POST", f"{up.url}/chat/completions", json=body, trust_env=False) as answer:
                    got += any('"content"' in line for line in answer.iter_lines() if line.startswith("data:"))
                    continue
            wait_for(lambda: len(rows_of(up)) == 20)
            rows = rows_of(up)
        assert got == 20
        assert all(row.billed_output_tokens >= 1 and row.billed_prompt_tokens >= 1 for row in rows), rows


# --- the journal by itself ---


@contextmanager
def small(monkeypatch: pytest.MonkeyPatch, size_bytes: int = 4096) -> Iterator[None]:
    """Segments that are soon full."""
    monkeypatch.setattr(journals, "SEGMENT_BYTES", size_bytes)
    monkeypatch.setattr(journals, "PREPARE_AT", size_bytes // 2)
    yield


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "timed out waiting"
        await asyncio.sleep(0.02)


def line(kind: str, number: int) -> bytes:
    if kind == "i":
        names = b'"key":"k","gateway":"g","model":"m","deployment":"d","region":"r"'
        return b'{"t":"i","id":"r-%d","at_ms":5,%b}\n' % (number, names)
    return (
        b'{"t":"s","id":"r-%d","at_ms":3600007,"outcome":"ok","prompt_tokens":3,"output_tokens":4,"exact":1,'
        b'"billed_prompt_tokens":3,"billed_output_tokens":4,"bytes":9}\n' % number
    )


def book_in(folder: Path) -> tuple[UsageIngest, Database]:
    database = Database(folder / "store.db")
    database.migrate()
    return UsageIngest(folder, database), database


def count(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.text("select count(*) from usage_rows")).scalar() or 0)


def test_segments_follow_each_other_and_go_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(monkeypatch):
        book, database = book_in(tmp_path)

        async def scene() -> None:
            journal = UsageJournal(tmp_path, lambda sentence: None)
            journal.begin(asyncio.get_running_loop())
            for number in range(400):
                journal.add(line("i", number))
                if number >= 10:
                    journal.add(line("s", number - 10))
                if number % 20 == 0:
                    await asyncio.sleep(0.02)
                    book.take()
            await until(lambda: not journal.is_short)
            assert book.take() is not None and count(database) == 390
            assert len(list((tmp_path / "journal").iterdir())) <= 4
            assert journal.lost == 0
            journal.close()

        asyncio.run(scene())
        assert book.take() == 10  # its writer is gone, so the last ten will not be settled by it
        assert count(database) == 400
        assert not list((tmp_path / "journal").iterdir())
        assert UsageIngest(tmp_path, database).take() == 0
        with database.read() as connection:
            sums = connection.execute(sa.text("select hour, attempts, billed_output_tokens from usage_hours")).all()
        assert (1, 390, 390 * 4) in [tuple(row) for row in sums]


def test_a_reader_that_dies_between_two_takes_counts_nothing_twice(tmp_path: Path) -> None:
    book, database = book_in(tmp_path)

    async def scene() -> None:
        nonlocal book
        journal = UsageJournal(tmp_path, lambda sentence: None)
        journal.begin(asyncio.get_running_loop())
        for number in range(30):
            journal.add(line("i", number))
            if number % 3 == 0:
                book.take()
                book = UsageIngest(tmp_path, database)  # all that it knew by heart is gone
            journal.add(line("s", number))
        await asyncio.sleep(0.05)
        book.take()
        journal.close()

    asyncio.run(scene())
    book.take()
    assert count(database) == 30


def test_row_68_a_disk_that_is_full_stops_nobody_and_costs_no_row(tmp_path: Path) -> None:
    """A real file system of one megabyte: no segment fits until somebody makes room by making it larger."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = tmp_path / "small"
    mounted.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)], check=False)
    if made.returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        told: list[str] = []

        async def scene() -> None:
            journal = UsageJournal(mounted, told.append)
            journal.begin(asyncio.get_running_loop())
            for number in range(200):
                journal.add(line("i", number))
                journal.add(line("s", number))
            assert journal.is_short and journal.lost == 0
            grow = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=64m", str(mounted))
            assert await grow.wait() == 0
            journal.check(time.monotonic() + 5)
            await until(lambda: not journal.is_short)
            journal.close()

        asyncio.run(scene())
        assert len(told) == 1 and os.strerror(errno.ENOSPC) in told[0]
        _, database = book_in(tmp_path)
        assert UsageIngest(mounted, database).take() == 200
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_row_68_what_finds_no_room_in_memory_either_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "BUFFER_BYTES_MAX", 10_000)
    (tmp_path / "journal").write_text("in the way")

    async def scene() -> None:
        journal = UsageJournal(tmp_path, lambda sentence: None)
        journal.begin(asyncio.get_running_loop())
        for number in range(1000):
            journal.add(line("i", number))
        assert journal.is_short and 800 < journal.lost < 1000
        (tmp_path / "journal").unlink()
        await asyncio.sleep(0.2)  # an attempt that was under way may fail first
        journal.check(time.monotonic() + 5)
        await until(lambda: not journal.is_short)
        journal.add(line("i", 1000))
        journal.close()

    asyncio.run(scene())
    _, database = book_in(tmp_path)
    UsageIngest(tmp_path, database).take()
    assert 0 < count(database) < 201


def test_sigstop_of_the_control_process_loses_no_row(tmp_path: Path) -> None:
    with Wall() as wall:
        documents = [deployment("a", f"http://127.0.0.1:{wall.port}/v1", models=MODELS)]
        with Up(tmp_path, [*documents, gateway("chat", "a")], "--auth", "none") as up:
            (control,) = up.children(CONTROL)
            os.kill(control, signal.SIGSTOP)
            try:
                for _ in range(50):
                    assert up.ask(model="ok").status_code == 200
            finally:
                os.kill(control, signal.SIGCONT)
            wait_for(lambda: len(rows_of(up)) == 50)
            answer = up.ask(model="ok")
            wait_for(lambda: len(rows_of(up)) == 51)
            shown = up.cli("get", "usage").stdout
            assert "51" in shown and "anonymous" in shown
            one = up.cli("get", "usage", answer.headers["x-request-id"])
            assert f"{answer.headers['x-request-id']}-1" in one.stdout and "ok" in one.stdout
            assert up.cli("get", "usage", "req_unknown").returncode == 1
