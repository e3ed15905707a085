"""The steps of a rolling upgrade, without processes: the old workers serve until the new ones accept."""

import subprocess
from typing import cast

import pytest

from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.supervisor.child_process import ChildProcess
from fleetgate.supervisor.rolling_upgrade import (
    DRAIN_S_MAX,
    START_S_MAX,
    ProcessControl,
    RollingUpgrade,
    UpgradeStage,
)


class FakeProcess:
    """A process that exits when the test says so."""

    def __init__(self) -> None:
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code


class Rig:
    """An upgrade of two workers, and what it asks of the supervisor."""

    def __init__(self) -> None:
        self.memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(4))), 4)
        self.events: list[str] = []
        self.retired: list[str] = []
        self.killed: list[str] = []
        control = ProcessControl(
            workers_of=self.workers_of,
            start=self.start,
            retire=lambda child: self.retired.append(child.name),
            kill=lambda child: self.killed.append(child.name),
            emit_event=self.events.append,
        )
        first = self.workers_of(0)
        for child in first:
            self.start(child, 0.0)
            self.accept(child)
        self.upgrade = RollingUpgrade(self.memory, first, control)

    def workers_of(self, generation: int) -> list[ChildProcess]:
        columns = (2 * generation, 2 * generation + 1)
        return [ChildProcess(name=f"worker {n}", argv=[], env={}, fds=[], worker=n) for n in columns]

    def start(self, child: ChildProcess, now_s: float) -> None:
        child.process = cast("subprocess.Popen[bytes]", FakeProcess())

    def accept(self, child: ChildProcess) -> None:
        self.memory.set(child.worker, WorkerCell.ACCEPTING, 1)

    @staticmethod
    def exit(child: ChildProcess, code: int = 0) -> None:
        cast(FakeProcess, child.process).code = code


@pytest.fixture
def rig() -> Rig:
    return Rig()


def stage(rig: Rig) -> UpgradeStage:
    return rig.upgrade.stage


def names(children: list[ChildProcess]) -> list[str]:
    return [child.name for child in children]


def test_new_workers_take_over_when_all_of_them_accept(rig: Rig) -> None:
    upgrade = rig.upgrade
    assert not upgrade.poll(0.0) and stage(rig) is UpgradeStage.IDLE
    upgrade.request()
    assert not upgrade.poll(1.0)
    assert stage(rig) is UpgradeStage.STARTING and names(upgrade.serving) == ["worker 0", "worker 1"]
    rig.accept(upgrade.starting[0])
    assert not upgrade.poll(2.0) and not rig.retired
    rig.accept(upgrade.starting[1])
    assert upgrade.poll(3.0)
    assert names(upgrade.serving) == ["worker 2", "worker 3"] and rig.retired == ["worker 0", "worker 1"]
    assert rig.events[-1].startswith("2 new workers serve")
    rig.exit(upgrade.draining[0])
    upgrade.poll(4.0)
    assert names(upgrade.draining) == ["worker 1"] and stage(rig) is UpgradeStage.DRAINING
    rig.exit(upgrade.draining[0])
    upgrade.poll(5.0)
    assert stage(rig) is UpgradeStage.IDLE and "upgrade is complete" in rig.events[-1]
    assert rig.memory.get(0, WorkerCell.ACCEPTING) == 0


def test_a_new_worker_that_exits_cancels_the_upgrade(rig: Rig) -> None:
    upgrade = rig.upgrade
    upgrade.request()
    upgrade.poll(0.0)
    rig.exit(upgrade.starting[1], 3)
    assert not upgrade.poll(1.0)
    assert stage(rig) is UpgradeStage.IDLE and rig.killed == ["worker 2", "worker 3"]
    assert names(upgrade.all_workers) == ["worker 0", "worker 1"] and not rig.retired
    assert "cancelled" in rig.events[-1] and "new worker 3 exited with code 3" in rig.events[-1]


def test_new_workers_that_do_not_accept_in_time_cancel_the_upgrade(rig: Rig) -> None:
    upgrade = rig.upgrade
    upgrade.request()
    upgrade.poll(0.0)
    upgrade.poll(START_S_MAX)
    assert stage(rig) is UpgradeStage.STARTING
    upgrade.poll(START_S_MAX + 1)
    assert stage(rig) is UpgradeStage.IDLE and "within 60 s" in rig.events[-1]


def test_an_old_worker_that_never_exits_is_killed_at_last(rig: Rig) -> None:
    upgrade = rig.upgrade
    upgrade.request()
    upgrade.poll(0.0)
    for child in upgrade.starting:
        rig.accept(child)
    assert upgrade.poll(1.0)
    upgrade.poll(1.0 + DRAIN_S_MAX)
    assert not rig.killed
    upgrade.poll(2.0 + DRAIN_S_MAX)
    assert rig.killed == ["worker 0", "worker 1"] and stage(rig) is UpgradeStage.IDLE


def test_a_request_while_one_runs_begins_after_it(rig: Rig) -> None:
    upgrade = rig.upgrade
    upgrade.request()
    upgrade.poll(0.0)
    upgrade.request()
    assert "next one begins" in rig.events[-1]
    for child in upgrade.starting:
        rig.accept(child)
    upgrade.poll(1.0)
    for child in upgrade.draining:
        rig.exit(child)
    upgrade.poll(2.0)
    assert stage(rig) is UpgradeStage.IDLE
    upgrade.poll(3.0)
    assert stage(rig) is UpgradeStage.STARTING and names(upgrade.starting) == ["worker 0", "worker 1"]
