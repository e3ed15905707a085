"""Only faults in a readable file are in force."""

from pathlib import Path

from fleetgate.core.fault_injection import Fault, FaultKind, InjectedFaults, encode_injected
from fleetgate.ipc.fault_file import FAULTS, FaultFile

NOW_S = 1_000.0


def write(folder: Path, *names: str) -> None:
    faults = tuple(
        Fault(name=name, kind=FaultKind.CUT, deployment="a", share=0.5, begins_s=NOW_S, ends_s=NOW_S + 60)
        for name in names
    )
    fresh = folder / "fresh"
    fresh.write_bytes(encode_injected(InjectedFaults(watched_s=NOW_S, faults=faults)))
    fresh.rename(folder / FAULTS)


def test_a_missing_or_damaged_file_has_no_faults(tmp_path: Path) -> None:
    file = FaultFile(tmp_path)
    assert file.now(NOW_S) == ()
    write(tmp_path, "cut-1")
    assert [fault.name for fault in file.now(NOW_S)] == ["cut-1"]
    (tmp_path / FAULTS).write_bytes(b'{"faults":[{"na')
    assert file.now(NOW_S) == ()
    write(tmp_path, "cut-2", "cut-3")
    assert [fault.name for fault in file.now(NOW_S)] == ["cut-2", "cut-3"]
    (tmp_path / FAULTS).unlink()
    assert file.now(NOW_S) == ()


def test_a_fault_is_in_force_until_its_end(tmp_path: Path) -> None:
    write(tmp_path, "cut-1")
    file = FaultFile(tmp_path)
    assert [len(file.now(at_s)) for at_s in (NOW_S - 1, NOW_S, NOW_S + 59, NOW_S + 60)] == [0, 1, 1, 0]
