"""Sheds load before a worker runs out of memory, connections or descriptors.

A request reads one number, the share of new requests to refuse. It is updated four times a second.
"""

import resource
from pathlib import Path

import msgspec

from fleetgate.ipc.machine_status import OverloadBits
from fleetgate.proxy.overload.memory_pressure import MemoryPressure

TIGHT, SURPLUS, FULL = 0.85, 0.95, 1.0  # of the connections allowed: close idle ones, refuse new ones, accept none
DESCRIPTORS_MAX = 1 << 17  # more than one CPU core can serve
DESCRIPTORS_SHARE = 0.9  # of the limit; the rest is for upstreams, files and the Snapshot
_DESCRIPTORS = Path("/proc/self/fd")


class OverloadState(msgspec.Struct, frozen=True):
    """How close a worker is to its limits, and what to do.

    Shape: `bits` for `WorkerCell.SHORT`; `accepts` is False to stop accepting, None to leave that as it is; `notices`
    are pairs of kind and message.
    """

    shed_share: float
    bits: int
    closes_idle: bool
    accepts: bool | None
    notices: tuple[tuple[str, str], ...]


class OverloadManager:
    """One worker's overload manager. Shape: `connections_max` 0 for half of the descriptors."""

    def __init__(self, connections_max: int) -> None:
        self._descriptors = _raise_descriptor_limit()
        self._memory = MemoryPressure()
        self.connections_max = connections_max or self._descriptors // 2  # faults.md row 69

    @property
    def memory_bytes(self) -> int:
        """The memory that this process may use."""
        return self._memory.limit_bytes

    def check(self, connections: int, bodies_are_tight: bool) -> OverloadState:
        """Compare use with limits. Called four times a second. Cost: 30 µs."""
        used = _open_descriptors() / (self._descriptors * DESCRIPTORS_SHARE)
        full = max(connections / self.connections_max, used)
        by_memory = self._memory.shed_share()
        by_descriptors = min(1.0, max(0.0, (used - SURPLUS) / (FULL - SURPLUS)))
        bits = OverloadBits.MEMORY * (by_memory > 0) + OverloadBits.CONNECTIONS * (full >= TIGHT)
        bits += OverloadBits.BODIES * bodies_are_tight
        notices = []
        if by_memory > 0:
            message = f"memory is short: {by_memory:.0%} of new requests get 503; requests in flight continue"
            notices.append(("memory", message))
        if full >= TIGHT:
            notices.append(("connections", f"connections are at {full:.0%} of their limit; idle ones are closed"))
        return OverloadState(
            shed_share=max(by_memory, by_descriptors),
            bits=int(bits),
            closes_idle=full >= TIGHT,
            accepts=False if full >= FULL else True if full < SURPLUS else None,
            notices=tuple(notices),
        )


def _raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to what the operator allows; most systems start at 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return min(soft, DESCRIPTORS_MAX) if soft > 0 else DESCRIPTORS_MAX
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _open_descriptors() -> int:
    """The number of open descriptors; 0 if the system does not report it."""
    try:
        return _DESCRIPTORS.stat().st_size or len(list(_DESCRIPTORS.iterdir()))  # st_size is set since Linux 6.2
    except OSError:
        return 0
