"""What the kernel reports about processes, and which cores they may use."""

import contextlib
import os
import platform
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Cores(NamedTuple):
    """Cores of the proxy, and cores that mock and client share, so that neither side takes the other's time."""

    proxy: list[int]
    load: list[int]


def cores_for(workers: int = 1) -> Cores:
    """The first cores go to the proxy, the next to mock and client. With too few cores all share all."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) <= workers:
        return Cores(cpus, cpus)
    return Cores(cpus[:workers], cpus[workers : workers + 2])


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Pin every thread of a process; threads that have just ended are skipped."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def command_of(pid: int) -> str:
    """The command line of a process, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


class CpuTime(NamedTuple):
    """CPU time used so far. Shape: `ns` is by thread and exact; `ticks_s` also counts threads that have ended."""

    ns: dict[tuple[int, int], int]
    ticks_s: float


def cpu_time(pids: Iterable[int]) -> CpuTime:
    """Read the CPU time of processes, user and system together."""
    ns: dict[tuple[int, int], int] = {}
    ticks = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                ns[pid, int(task.name)] = int((task / "schedstat").read_text().split()[0])
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return CpuTime(ns, ticks / TICKS_PER_S)


def cpu_used_s(before: CpuTime, after: CpuTime) -> float:
    """CPU time between two readings: to the nanosecond, or in ticks if threads ended in between."""
    if before.ns and before.ns.keys() <= after.ns.keys():
        return sum(ns - before.ns.get(thread, 0) for thread, ns in after.ns.items()) / 1e9
    return after.ticks_s - before.ticks_s


def memory_mb(pids: Iterable[int]) -> tuple[float, float]:
    """Resident and proportional memory (shared pages divided by their users) of processes, in MB of 10^6 bytes."""
    sums = {"Rss": 0, "Pss": 0}
    for pid in pids:
        for name, kb in re.findall(r"^(Rss|Pss):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M):
            sums[name] += int(kb) * 1024
    return sums["Rss"] / 1e6, sums["Pss"] / 1e6


def free_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def describe() -> dict[str, str]:
    """The facts about this machine that belong to the figures."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", info)
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model.group(1).strip() if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gb": f"{int(total.group(1)) / 1e6:.0f}" if total else "?",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
