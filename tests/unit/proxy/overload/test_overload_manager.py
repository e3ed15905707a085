"""Memory, connections and the event loop that run short."""

import sys
import time
from pathlib import Path

import pytest

from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.log import Log
from fleetgate.ipc.machine_status import OverloadBits
from fleetgate.proxy.overload import overload_manager
from fleetgate.proxy.overload.memory_pressure import MemoryPressure
from fleetgate.proxy.overload.notices import EVENT_EVERY_S, OperatorNotices
from fleetgate.proxy.overload.overload_manager import OverloadManager
from fleetgate.proxy.overload.watchdog import LAG_MAX_S, Watchdog, stack_summary

GIB = 1 << 30


def machine(root: Path, total_bytes: int, left_bytes: int) -> MemoryPressure:
    (root / "meminfo").write_text(f"MemTotal: {total_bytes // 1024} kB\nMemAvailable: {left_bytes // 1024} kB\n")
    return MemoryPressure(root / "cgroup", root)


def grouped(root: Path, limit: str, used_bytes: int, cached_bytes: int = 0) -> MemoryPressure:
    group = root / "cgroup" / "a" / "b"
    group.mkdir(parents=True, exist_ok=True)
    (root / "self").mkdir(exist_ok=True)
    (root / "self" / "cgroup").write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{limit}\n")
    (group.parent / "memory.current").write_text(f"{used_bytes}\n")
    (group.parent / "memory.stat").write_text(f"inactive_file {cached_bytes}\nactive_file 0\n")
    return machine(root, 64 * GIB, 60 * GIB)


@pytest.mark.parametrize(("used", "share"), [(0.5, 0.0), (0.85, 0.0), (0.9, 0.5), (0.95, 1.0), (1.0, 1.0)])
def test_the_share_that_is_shed_rises_with_what_the_group_uses(tmp_path: Path, used: float, share: float) -> None:
    pressure = grouped(tmp_path, str(GIB), int(used * GIB))
    assert pressure.limit_bytes == GIB and pressure.shed_share() == pytest.approx(share, abs=1e-6)


def test_pages_of_files_do_not_count(tmp_path: Path) -> None:
    assert grouped(tmp_path, str(GIB), GIB, cached_bytes=GIB // 2).shed_share() == 0.0


def test_without_a_limit_what_is_left_on_the_machine_counts(tmp_path: Path) -> None:
    assert grouped(tmp_path, "max", GIB).limit_bytes == 64 * GIB
    assert machine(tmp_path, 64 * GIB, 300 << 20).shed_share() == 0.0
    assert 0.0 < machine(tmp_path, 64 * GIB, 200 << 20).shed_share() < 1.0
    assert machine(tmp_path, 64 * GIB, 90 << 20).shed_share() == 1.0


def test_a_system_that_tells_nothing_sheds_nothing(tmp_path: Path) -> None:
    assert MemoryPressure(tmp_path / "no", tmp_path / "no").shed_share() == 0.0


def test_connections_that_run_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload_manager, "_open_descriptors", lambda: 0)
    manager = OverloadManager(100)
    monkeypatch.setattr(manager._memory, "shed_share", lambda: 0.0)
    states = {count: manager.check(count, False) for count in (84, 85, 95, 100)}
    assert [states[count].closes_idle for count in states] == [False, True, True, True]
    assert [states[count].accepts for count in states] == [True, True, None, False]
    assert states[84].bits == 0 and states[100].bits == OverloadBits.CONNECTIONS and states[100].shed_share == 0.0
    assert manager.check(0, True).bits == OverloadBits.BODIES
    assert OverloadManager(0).connections_max == manager._descriptors // 2


def test_descriptors_and_memory_that_run_short_are_told_and_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = OverloadManager(100)
    monkeypatch.setattr(manager._memory, "shed_share", lambda: 0.25)
    monkeypatch.setattr(overload_manager, "_open_descriptors", lambda: manager._descriptors)
    state = manager.check(0, False)
    assert state.shed_share == 1.0 and state.accepts is False
    assert [kind for kind, _ in state.notices] == ["memory", "connections"] and "25%" in state.notices[0][1]


def test_notices_of_one_kind_are_events_once_a_minute(tmp_path: Path) -> None:
    now_s = 0.0
    spool = EventSpool(tmp_path)
    notices = OperatorNotices(Log(worker=3), spool, 3, lambda: now_s)
    for kind in ("memory", "memory", "lag"):
        notices.emit(kind, kind)
    now_s = EVENT_EVERY_S - 0.1
    notices.emit("memory", "memory")
    now_s = EVENT_EVERY_S
    notices.emit("memory", "again")
    events = spool.take()
    assert [event.message for event in events] == ["memory", "lag", "again"] and events[0].name == "worker 3"


def test_a_loop_that_stands_still_is_noticed_with_its_place() -> None:
    told: list[tuple[float, str]] = []
    watchdog = Watchdog(0.05, lambda lag_s, where: told.append((lag_s, where)))
    try:
        watchdog.beat()
        assert not told
        until_s = time.monotonic() + LAG_MAX_S + 0.4
        while time.monotonic() < until_s:
            pass
        watchdog.beat()
    finally:
        watchdog.stop()
    ((lag_s, where),) = told
    assert lag_s > LAG_MAX_S and "test_a_loop_that_stands_still" in where


def test_a_stack_is_told_without_values() -> None:
    secret = "sk-secret"
    assert secret not in stack_summary(sys._getframe()) and "without_values" in stack_summary(sys._getframe())
