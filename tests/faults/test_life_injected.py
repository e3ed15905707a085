"""`fleetgate fault inject`: what clients notice, how it ends, and that it ends."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fleetgate.control.context import Control
from fleetgate.control.faults import FaultService
from fleetgate.core.fault_injection import Fault, FaultKind
from tests.faults.life_load import Load
from tests.faults.test_life_upgrade import running
from tests.loopback.up_rig import Up
from tests.waiting import wait_for


def inject(up: Up, *words: str) -> dict[str, Any]:
    """Put a fault in force and return it as the API shows it."""
    told = up.cli("fault", "inject", *words, "-o", "json")
    assert told.returncode == 0, told.stderr
    return dict(json.loads(told.stdout))


def in_force(up: Up) -> list[dict[str, Any]]:
    """What is listed."""
    return list(json.loads(up.cli("get", "faults", "-o", "json").stdout))


def sentences(up: Up) -> str:
    """All Events."""
    return up.cli("get", "events").stdout


@pytest.mark.parametrize("kind", ["refuse", "error", "delay"])
def test_a_fault_before_the_first_token_is_not_noticed_with_another_region(tmp_path: Path, kind: str) -> None:
    with running(tmp_path) as up, Load(up.port, short=6, streams=6) as load:
        wait_for(lambda: load.outcomes["stream"] > 3)
        made = inject(up, kind, "--deployment", "a", "--share", "0.3", "--delay", "300ms", "--stop-below-slo", "0")
        wait_for(lambda: in_force(up)[0]["struck"] > 5)
        told = up.cli("fault", "end", made["name"])
        assert told.returncode == 0 and "ended; it affected" in told.stdout, told.stderr
        assert in_force(up) == []
        load.stop()
        assert not load.bad, load.bad


def test_a_cut_is_loud_and_only_its_share_is_cut(tmp_path: Path) -> None:
    """Where a stream can be resumed nothing is noticed; where not, it ends with an error and never silently."""
    with running(tmp_path) as up, Load(up.port, short=0, streams=20) as load:
        wait_for(lambda: load.outcomes["stream"] > 10)
        inject(up, "cut", "--deployment", "a", "--share", "0.5", "--stop-below-slo", "0")
        wait_for(lambda: in_force(up)[0]["struck"] > 3)  # few get there: its breaker opens
        load.stop()
        assert "stream: cut silently" not in load.bad, load.bad
        assert load.outcomes["stream"] > 20


def test_a_fault_ends_when_its_time_is_over_although_everybody_else_is_dead(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=6, streams=0) as load:
        inject(up, "error", "--deployment", "a", "--share", "1", "--for", "4s", "--stop-below-slo", "0")
        begun_s = time.monotonic()
        (control,) = up.children("fleetgate.control.process")
        os.kill(control, signal.SIGSTOP)
        try:
            time.sleep(max(0.0, 4.5 - (time.monotonic() - begun_s)))
            answers = [up.ask().headers["x-fleetgate-attempts"] for _ in range(10)]
            assert answers == ["1"] * 10
        finally:
            os.kill(control, signal.SIGCONT)
        wait_for(lambda: "its 4 s are over" in sentences(up))
        assert "began: error for 100%" in sentences(up)
        load.stop()
        assert not load.bad, load.bad


def test_a_fault_with_a_bound_ends_when_nobody_watches_it(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        inject(up, "error", "--deployment", "a", "--share", "1", "--for", "1h")
        (control,) = up.children("fleetgate.control.process")
        os.kill(control, signal.SIGSTOP)
        try:
            struck = up.data_dir / "faults.json"
            assert struck.exists()
            time.sleep(5.5)
            assert [up.ask().headers["x-fleetgate-attempts"] for _ in range(5)] == ["1"] * 5
        finally:
            os.kill(control, signal.SIGCONT)


def test_a_fault_that_costs_too_much_of_the_slo_stops_by_itself(tmp_path: Path) -> None:
    with running(tmp_path) as up, Load(up.port, short=10, streams=0) as load:
        wait_for(lambda: load.outcomes["short"] > 50)
        for name in "ab":
            inject(
                up,
                "error",
                "--deployment",
                name,
                "--share",
                "1",
                "--status",
                "500",
                "--for",
                "1h",
                "--name",
                f"f{name}",
            )
        begun_s = time.monotonic()
        wait_for(lambda: not in_force(up), 20)
        assert "below its limit of 90%" in sentences(up)
        assert time.monotonic() - begun_s < 15
        wait_for(lambda: up.ask().status_code == 200)
        load.stop()
        assert load.bad  # all of both regions failed for a second or two


def test_mistakes_are_told_with_their_place(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        for words, code, told in (
            (("explode", "--deployment", "a"), 2, "not a kind of fault; use one of: delay,"),
            (("cut", "--deployment", "nobody"), 1, "there is no Deployment 'nobody'"),
            (("cut", "--deployment", "a", "--share", "2"), 1, "--share: "),
            (("cut", "--deployment", "a", "--share", "nan"), 1, "--share: nan is not a finite number; give a number"),
            (("cut", "--deployment", "a", "--for", "2h"), 1, "--for: "),
            (("cut", "--deployment", "a", "--for", "soon"), 2, "not a duration"),
        ):
            answer = up.cli("fault", "inject", *words)
            assert answer.returncode == code, answer.stderr
            assert told in answer.stderr.replace("\n", " "), answer.stderr


def test_faults_begin_and_end_while_they_are_watched(tmp_path: Path) -> None:
    """The look once a second runs in a thread of its own, and writes the same file."""
    control = SimpleNamespace(
        data_dir=SimpleNamespace(path=tmp_path),
        shared_memory=None,
        publisher=SimpleNamespace(current=None),
        record=lambda kind, name, sentence: None,
    )
    faults, stop, trouble = FaultService(cast(Control, control)), threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            try:
                faults._poll()
            except Exception as error:
                trouble.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(200):
            now_s = time.time()
            name = f"cut-{number}"
            faults.begin(
                Fault(
                    name=name, kind=FaultKind.CUT, deployment="a", share=0.1, begins_s=now_s, ends_s=now_s + 60,
                    stop_below_slo=0.5,
                )
            )  # fmt: skip
            assert faults.end(name, "the test is over") is not None
    finally:
        stop.set()
        watcher.join(10)
    assert not trouble, trouble[:3]
