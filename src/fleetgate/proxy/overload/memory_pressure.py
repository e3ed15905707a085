"""How much memory this process may use and how full that is: of the cgroup where it has a limit, else the machine."""

from pathlib import Path
from typing import NamedTuple

_NO_LIMIT_BYTES = 1 << 60  # what version 1 writes for none is near 2**63
# A machine has other tenants, so what counts there is what is left, not a share.
MACHINE_LEFT_BYTES = (256 * 1024 * 1024, 96 * 1024 * 1024)  # where shedding begins and where all is shed
GROUP_USED = (0.85, 0.95)  # FAULTS.md row 70


class _Group(NamedTuple):
    """The files of one cgroup."""

    limit: Path
    used: Path
    stat: Path
    prefix: str  # of the rows in `stat`


class MemoryPressure:
    """Shape: `root` and `proc` are where the kernel shows cgroups and processes. Cost: 40 µs a look."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._meminfo = proc / "meminfo"
        self._group: _Group | None = None
        self.limit_bytes, _ = self._machine()
        for group in _groups(root, proc):
            limit_bytes = _number(group.limit)
            if 0 < limit_bytes < self.limit_bytes:
                self.limit_bytes, self._group = limit_bytes, group

    def shed_share(self) -> float:
        """The share of new requests that should be refused so that running ones can end; 0 is none."""
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
        """All memory and what is left, bytes; a system that does not tell has plenty."""
        rows = _rows(self._meminfo)
        return rows.get("MemTotal:", _NO_LIMIT_BYTES // 1024) * 1024, rows.get("MemAvailable:", 1 << 40) * 1024


def _groups(root: Path, proc: Path) -> list[_Group]:
    """Every cgroup that this process is in, as far up as it can be seen: the smallest limit holds."""
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
        place = top / path.strip("/")
        while True:  # inside a container the path is the host's, and only its top is there
            if (place / names[0]).exists():
                found.append(_Group(place / names[0], place / names[1], place / "memory.stat", names[2]))
            if place == top:
                break
            place = place.parent
    return found


def _number(path: Path) -> int:
    """A file of one number; 0 for `max` and for what cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else 0


def _cached(group: _Group) -> int:
    """Pages of files, which the kernel takes back by itself."""
    rows = _rows(group.stat)
    return rows.get(f"{group.prefix}inactive_file", 0) + rows.get(f"{group.prefix}active_file", 0)


def _rows(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {row[0]: int(row[1]) for row in words if len(row) > 1 and row[1].isdigit()}
