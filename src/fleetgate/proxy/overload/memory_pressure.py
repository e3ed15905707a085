"""The memory that this process may use and how full it is: of its cgroup if that has a limit, else of the machine."""

from pathlib import Path
from typing import NamedTuple

_NO_LIMIT_BYTES = 1 << 60  # cgroup version 1 writes a number near 2**63 for no limit
# Other processes use the machine too, so its bounds are of the memory that is left, not of the share in use.
MACHINE_LEFT_BYTES = (256 * 1024 * 1024, 96 * 1024 * 1024)  # shedding begins; all is shed
GROUP_USED = (0.85, 0.95)  # faults.md row 70


class _Group(NamedTuple):
    """The files of one cgroup."""

    limit: Path
    used: Path
    stat: Path
    prefix: str  # of the names in `stat`


class MemoryPressure:
    """Measures memory. Shape: `root` and `proc` are the folders of cgroups and processes. Cost: 40 µs a call."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._meminfo = proc / "meminfo"
        self._group: _Group | None = None
        self.limit_bytes, _ = self._machine()
        for group in _groups(root, proc):
            limit_bytes = _number(group.limit)
            if 0 < limit_bytes < self.limit_bytes:
                self.limit_bytes, self._group = limit_bytes, group

    def shed_share(self) -> float:
        """The share of new requests to refuse so that running ones can end, 0 to 1."""
        begin, full = GROUP_USED
        group = self._group
        if group is not None:
            used = (_number(group.used) - _cached(group)) / max(1, self.limit_bytes)
        else:
            limit_bytes, left_bytes = self._machine()
            begin, full = (1 - min(bound, limit_bytes * (1 - share)) / max(1, limit_bytes) for bound, share in zip(
                MACHINE_LEFT_BYTES, GROUP_USED, strict=True))  # fmt: skip
            used = 1 - left_bytes / max(1, limit_bytes)
        return min(1.0, max(0.0, (used - begin) / (full - begin)))

    def _machine(self) -> tuple[int, int]:
        """The machine's memory and what is left of it, in bytes; very much if the system does not report it."""
        rows = _rows(self._meminfo)
        return rows.get("MemTotal:", _NO_LIMIT_BYTES // 1024) * 1024, rows.get("MemAvailable:", 1 << 40) * 1024


def _groups(root: Path, proc: Path) -> list[_Group]:
    """The cgroups of this process up to the topmost visible one. The smallest limit of all applies."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif number == "0":
            top, names = root, ("memory.max", "memory.current", "")
        else:
            continue
        folder = top / path.strip("/")
        while True:  # in a container the path is the host's, and only its top exists
            if (folder / names[0]).exists():
                found.append(_Group(folder / names[0], folder / names[1], folder / "memory.stat", names[2]))
            if folder == top:
                break
            folder = folder.parent
    return found


def _number(path: Path) -> int:
    """The number in a file; 0 for `max` and for a file that cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else 0


def _cached(group: _Group) -> int:
    """Bytes of cached files, which the kernel frees when memory is needed."""
    rows = _rows(group.stat)
    return rows.get(f"{group.prefix}inactive_file", 0) + rows.get(f"{group.prefix}active_file", 0)


def _rows(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in words if len(row) > 1 and row[1].isdigit()}
