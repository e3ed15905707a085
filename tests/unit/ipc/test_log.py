"""The log of a process: JSON lines with levels that never block the code that writes them."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetgate.ipc.log import LEVEL_ENV, Level, LineWriter, Log, log_line
from tests.waiting import wait_for


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_to(path: Path, **fields: object) -> Log:
    return Log(LineWriter(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)), **fields)


def test_a_line_has_time_level_event_fields_and_message() -> None:
    line = json.loads(log_line(Level.WARNING, "lag", 'blocked "here"\n', worker=0, id="req_1", deployment=""))
    assert list(line) == ["at_ms", "level", "event", "worker", "id", "message"]
    assert abs(line.pop("at_ms") - time.time() * 1000) < 10_000
    assert line == {"level": "warning", "event": "lag", "worker": 0, "id": "req_1", "message": 'blocked "here"\n'}


def test_levels_below_the_chosen_one_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chosen, expected in (("", 3), ("debug", 4), ("ERROR", 1), ("loud", 3)):
        monkeypatch.setenv(LEVEL_ENV, chosen)
        path = tmp_path / f"log{chosen}"
        log = log_to(path, worker=1)
        for level in (log.debug, log.info, log.warning, log.error):
            level("worker", "happened")
        log.drain()
        assert [line["level"] for line in lines_of(path)] == ["debug", "info", "warning", "error"][-expected:]
        assert all(line["worker"] == 1 for line in lines_of(path))


def test_a_full_pipe_blocks_nothing_and_lost_lines_are_counted() -> None:
    read_fd, write_fd = os.pipe()
    try:
        log = Log(LineWriter(write_fd, backlog_bytes_max=10_000))
        started_s = time.monotonic()
        for _ in range(5_000):
            log.info("worker", "x" * 100)
        assert time.monotonic() - started_s < 2.0
        assert log.dropped > 4_000
        kept = 5_000 - log.dropped
        received = b""
        while received.count(b"\n") < kept:
            received += os.read(read_fd, 1 << 16)
        log.info("worker", "written again")
        assert b"written again" in os.read(read_fd, 1 << 16)
    finally:
        os.close(read_fd)


def test_a_non_blocking_descriptor_loses_nothing() -> None:
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    log = Log(LineWriter(write_fd))
    for _ in range(2_000):
        log.info("worker", "x" * 100)
    received = b""
    while received.count(b"\n") < 2_000:
        received += os.read(read_fd, 1 << 16)
    assert not log.dropped
    os.close(read_fd)


def test_a_reader_that_is_gone_costs_lines_only() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    log = Log(LineWriter(write_fd))
    log.info("worker", "lost")
    wait_for(lambda: log.dropped == 1)
    log.drain()


def test_lines_of_logging_and_the_reason_of_a_crash_come_as_json() -> None:
    code = (
        "import logging; from fleetgate.ipc.log import Log; log = Log(worker=3); log.take_over(); "
        "logging.getLogger('asyncio').warning('slow %s', 'task'); logging.getLogger('x').info('quiet'); 1 / 0"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    slow, crash = (json.loads(line) for line in run.stderr.splitlines())
    assert run.returncode == 1
    assert (slow["level"], slow["event"], slow["worker"], slow["message"]) == ("warning", "asyncio", 3, "slow task")
    assert (crash["level"], crash["event"]) == ("error", "crash") and "ZeroDivisionError" in crash["message"]


def test_a_crash_with_a_full_pipe_still_ends_the_process() -> None:
    code = (
        "import os, logging; from fleetgate.ipc.log import Log; log = Log(); log.take_over()\n"
        "for _ in range(9999): log.info('worker', 'x' * 100)\n"
        "1 / 0"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert process.wait(20) == 1
    assert process.stderr is not None
    process.stderr.close()


def test_levels_have_the_numbers_of_the_standard_library() -> None:
    assert [level.value for level in Level] == [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR]
