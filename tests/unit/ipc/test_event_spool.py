"""Events between processes: nothing lost, nothing twice, whatever is in the file."""

import fcntl
import multiprocessing
import time
from pathlib import Path

from fleetgate.ipc.event_spool import BYTES_MAX, SPOOL, EventRecord, EventSpool


def add_many(data_dir: Path, name: str, count: int) -> None:
    spool = EventSpool(data_dir)
    for at in range(count):
        spool.add(EventRecord("Deployment", name, f"{at} of {name}"))


def test_what_several_processes_add_is_taken_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=add_many, args=(tmp_path, f"w{n}", 200)) for n in range(3)]
    for writer in writers:
        writer.start()
    taken = []
    while any(writer.is_alive() for writer in writers):
        taken += EventSpool(tmp_path).take()
    taken += EventSpool(tmp_path).take()
    assert len(taken) == 600
    for n in range(3):
        assert [happened.message for happened in taken if happened.name == f"w{n}"] == [
            f"{at} of w{n}" for at in range(200)
        ]
    assert EventSpool(tmp_path).take() == []


def test_nobody_waits_for_a_process_that_was_stopped_with_the_lock(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path)
    spool.add(EventRecord("Gateway", "chat", "one"))
    with (tmp_path / SPOOL).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began_s = time.monotonic()
        spool.add(EventRecord("Gateway", "chat", "two"))
        assert time.monotonic() - began_s < 2.0, "it would have waited for ever"
    spool.add(EventRecord("Gateway", "chat", "three"))
    assert [happened.message for happened in spool.take()] == ["one", "two", "three"]


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path)
    spool.add(EventRecord("Gateway", "chat", "one"))
    with (tmp_path / SPOOL).open("ab") as file:
        file.write(b'{"kind":"Ga\n')
    spool.add(EventRecord("Gateway", "chat", "two"))
    assert [happened.message for happened in spool.take()] == ["one", "two"]


def test_nobody_to_take_them_never_fills_the_disk(tmp_path: Path) -> None:
    spool = EventSpool(tmp_path)
    for _ in range(25):
        spool.add(EventRecord("Gateway", "chat", "x" * 60_000))
    assert (tmp_path / SPOOL).stat().st_size < BYTES_MAX + 61_000


def test_an_unwritable_place_stops_nobody(tmp_path: Path) -> None:
    EventSpool(tmp_path / "missing").add(EventRecord("Gateway", "chat", "one"))
