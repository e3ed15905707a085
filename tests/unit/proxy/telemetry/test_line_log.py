"""The access log and the file of `--record`: whole lines, written by a thread; dropped ones are counted."""

import json
import os
import time
from pathlib import Path

import pytest

from fleetgate.core.exchange import Outcome
from fleetgate.ipc.log import Level
from fleetgate.proxy.telemetry.access_log import NO_DEPLOYMENT, OUTCOME_BYTES, REQUEST_LINE, AccessLog
from fleetgate.proxy.telemetry.line_log import DroppedLines, LineLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from tests.loopback.control_rig import board_of
from tests.waiting import wait_for


def test_lines_are_written_at_the_next_flush(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = LineLog(str(path))
    log.add(b"one\n")
    log.add(b"two\n")
    assert path.read_bytes() == b""
    log.flush()
    wait_for(lambda: path.read_bytes() == b"one\ntwo\n")
    log.add(b"three\n")
    log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_off_keeps_nothing() -> None:
    log = AccessLog("off", 0)
    log.denied(404, "unknown_path")
    log.event(Level.INFO, "limit_changed", "8 instead of 6")
    log.close()
    assert not log.on and not log.dropped


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        LineLog(str(tmp_path / "absent" / "access.log"))


def test_every_line_of_the_access_log_is_json(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(str(path), 2)
    names = b'"gateway":"chat","model":"m"'
    log.add(
        REQUEST_LINE
        % (1, b"req_1", names, b'"key"', NO_DEPLOYMENT, 200, OUTCOME_BYTES[Outcome.OK], 1, b"true", 5, 9, 100, 3, 4)
    )
    log.denied(401, "invalid_api_key")
    log.event(Level.WARNING, "upstream_trouble", "refused", deployment="a")
    log.close()
    request, denied, trouble = (json.loads(line) for line in path.read_text().splitlines())
    assert (request["event"], request["outcome"], request["output_tokens"]) == ("request", "ok", 4)
    assert (denied["event"], denied["status"], denied["code"]) == ("denied", 401, "invalid_api_key")
    assert (trouble["level"], trouble["worker"], trouble["deployment"]) == ("warning", 2, "a")


def test_a_full_pipe_costs_lines_not_time_and_they_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    memory = board_of(1)
    log = LineLog(str(path))
    dropped = DroppedLines(WorkerMetrics(memory, 0), {"access": log})
    started_s = time.monotonic()
    for _ in range(200):
        for _ in range(100):
            log.add(b"x" * 9_999 + b"\n")
        log.flush()
    assert time.monotonic() - started_s < 5.0
    assert log.dropped > 5_000
    for _ in range(2):
        dropped.publish()
        assert memory.series_totals()['fleetgate_log_lines_dropped_total{log="access"}'] == log.dropped
    os.close(read_fd)
