"""The file of injected faults: the control process writes it, every worker reads it."""

from pathlib import Path

import msgspec

from fleetgate.core.fault_injection import Fault, InjectedFaults, active_faults, decode_injected

FAULTS = "faults.json"
_NO_FAULTS = InjectedFaults(watched_s=0.0)


class FaultFile:
    """A worker's view of the file. Only faults in a readable file are in force."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FAULTS
        self._file_version = (0, 0)  # inode and modification time of what was read last
        self._injected = _NO_FAULTS

    def now(self, now_s: float) -> tuple[Fault, ...]:
        """The faults in force.

        Units: `now_s` since the epoch. Cost: one `stat`, 2 µs, while the file does not change.
        """
        try:
            stat = self._path.stat()
            file_version = (stat.st_ino, stat.st_mtime_ns)
            if file_version != self._file_version:
                self._file_version = file_version
                self._injected = decode_injected(self._path.read_bytes())
        except (OSError, msgspec.MsgspecError):
            self._injected = _NO_FAULTS
        return active_faults(self._injected, now_s) if self._injected.faults else ()
