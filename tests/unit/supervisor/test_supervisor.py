"""What the supervisor does with a child that does not start."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.supervisor import supervisor
from fleetgate.supervisor.child_process import ChildProcess
from fleetgate.supervisor.rolling_upgrade import UpgradeHooks
from fleetgate.supervisor.supervisor import Supervisor


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Give this process its signal handlers back when the supervisor has ended."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_a_worker_that_cannot_start_is_reported_once_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_MAX_S", 0.2)
    memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
    log: list[str] = []
    events: list[str] = []

    def write_log(sentence: str) -> None:
        log.append(sentence)
        if len(log) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    argv = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    child = ChildProcess(name="worker 0", argv=argv, env={}, fds=[], worker=0)
    hooks = UpgradeHooks(lambda generation: [], events.append)
    assert Supervisor([child], memory, 1.0, write_log, hooks).run() == 0
    assert len(log) == 5 and all("worker 0 ended (exit code 3)" in sentence for sentence in log)
    assert len(events) == 1 and "worker 0 ended 3 times in a row" in events[0] and "exit code 3" in events[0]


@pytest.mark.usefixtures("own_signals")
def test_an_essential_child_that_does_not_start_ends_the_supervisor() -> None:
    memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
    argv = [sys.executable, "-S", "-c", "raise SystemExit(4)"]
    child = ChildProcess(name="control process", argv=argv, env={}, fds=[], essential=True)
    assert Supervisor([child], memory, 1.0, lambda sentence: None).run() == 4
