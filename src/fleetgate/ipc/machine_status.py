"""The state of a machine, read from shared memory: its Snapshot, and what is degraded while it still serves."""

from enum import IntFlag

import msgspec

from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory, WorkerCell

SILENT_S_MAX = 5.0  # the control process writes its heartbeat twice a second; a busy machine may delay it
LAG_SHOWN_S = 10.0  # a reader that polls every few seconds must not miss it
STUCK_S = 1.0  # twenty ticks of a worker


class OverloadBits(IntFlag):
    """What a worker is short of: the bits of `WorkerCell.SHORT`. While one is set, part of the new work is refused."""

    MEMORY = 1
    CONNECTIONS = 2
    BODIES = 4


_SHORTAGES = {
    OverloadBits.MEMORY: "memory: part of the new requests get 503",
    OverloadBits.CONNECTIONS: "connections or descriptors: idle connections close, new ones may get 503",
    OverloadBits.BODIES: "memory for request bodies: large ones may get 503",
}


class MachineStatus(msgspec.Struct, frozen=True):
    """The newest Snapshot in use, and what is degraded.

    Units: `age_s` since the Snapshot was made, `control_plane_silent_s` since the last heartbeat; -1 for never.
    """

    version: int
    age_s: float
    control_plane_silent_s: float
    degraded: tuple[str, ...]


def machine_status(memory: SharedMemory, now_s: float, epoch_s: float) -> MachineStatus:
    """Return the state of the machine. Units: `now_s` of the monotonic clock, `epoch_s` since the epoch."""
    live = running_workers(memory)
    versions = {worker: memory.get(worker, WorkerCell.SNAPSHOT_VERSION) for worker in live}
    newest = max(live, key=lambda worker: versions[worker], default=0)
    version = versions.get(newest, 0)
    age_s = max(0.0, epoch_s - memory.get(newest, WorkerCell.SNAPSHOT_AT_MS) / 1000) if version else -1.0
    heartbeat_ms = memory.control_plane[ControlPlaneCell.HEARTBEAT_MS]
    silent_s = max(0.0, now_s - heartbeat_ms / 1000) if heartbeat_ms else -1.0
    degraded = [
        f"worker {worker} uses Snapshot {versions[worker]}, because more requests failed with Snapshot {rolled_back}"
        for worker in live
        if (rolled_back := memory.get(worker, WorkerCell.SNAPSHOT_RETURNED)) > versions[worker]
    ]
    degraded += [
        f"worker {worker} is not running"
        for worker in range(memory.workers)
        if worker not in live and memory.get(worker, WorkerCell.STARTS)
    ]
    for worker in live:
        degraded += overload_reasons(memory, worker, now_s)
    if version and not 0 <= silent_s <= SILENT_S_MAX:
        silence = f"for {silent_s:.0f} s" if heartbeat_ms else "since the start"
        degraded.append(
            f"no heartbeat of the control plane {silence}; workers serve from Snapshot {version}, {age_s:.0f} s old"
        )
    return MachineStatus(version, age_s, silent_s, tuple(degraded))


def overload_reasons(memory: SharedMemory, worker: int, now_s: float) -> list[str]:
    """Return what limits a worker that still serves, in sentences. None of it makes the machine unready."""
    sentences = []
    stuck_s = now_s - memory.get(worker, WorkerCell.HEARTBEAT_MS) / 1000
    if stuck_s > STUCK_S:
        sentences.append(f"worker {worker} has not answered for {stuck_s:.1f} s: its event loop is blocked")
    if now_s - memory.get(worker, WorkerCell.LAG_AT_MS) / 1000 < LAG_SHOWN_S:
        lag_ms = memory.get(worker, WorkerCell.LAG_MS)
        sentences.append(f"the event loop of worker {worker} was blocked for {lag_ms} ms")
    if memory.get(worker, WorkerCell.JOURNAL_SHORT):
        lost = memory.get(worker, WorkerCell.ROWS_LOST)
        sentences.append(f"worker {worker} keeps usage rows in memory, because the disk refuses them; {lost} rows lost")
    short = OverloadBits(memory.get(worker, WorkerCell.SHORT))
    return sentences + [f"worker {worker} is short of {what}" for bit, what in _SHORTAGES.items() if bit in short]


def running_workers(memory: SharedMemory) -> list[int]:
    """Return the columns in which a worker runs."""
    return [worker for worker in range(memory.workers) if memory.get(worker, WorkerCell.PID)]
