"""How a machine stands, read off the board: ready or not, and what is not as it should be though traffic goes on."""

from enum import IntFlag

import msgspec

from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory, WorkerCell

SILENT_S_MAX = 5.0  # the control plane tells that it lives twice a second; a busy machine may keep it from that
LAG_SHOWN_S = 10.0  # a scrape or a look every few seconds must not miss it
STILL_S = 1.0  # twenty sweeps


class OverloadBits(IntFlag):
    """What a worker is short of, as bits of `WorkerCell.SHORT`. While any is set, some new requests are rejected."""

    MEMORY = 1
    CONNECTIONS = 2
    BODIES = 4


_SHORT_OF = {
    OverloadBits.MEMORY: "memory: part of the new requests get 503",
    OverloadBits.CONNECTIONS: "connections or descriptors: idle ones close, new ones may get 503",
    OverloadBits.BODIES: "room for request bodies: large ones may get 503",
}


class MachineStatus(msgspec.Struct, frozen=True):
    """Units: `age_s` since the Snapshot in use was made, `silent_s` since the control plane was heard; -1 for never."""

    version: int
    age_s: float
    control_plane_silent_s: float
    degraded: tuple[str, ...]


def machine_status(board: SharedMemory, now_s: float, epoch_s: float) -> MachineStatus:
    """The view of the machine: `now_s` is its monotonic clock, `epoch_s` the calendar's."""
    live = running_workers(board)
    versions = {worker: board.get(worker, WorkerCell.SNAPSHOT_VERSION) for worker in live}
    newest = max(live, key=lambda worker: versions[worker], default=0)
    version = versions.get(newest, 0)
    age_s = max(0.0, epoch_s - board.get(newest, WorkerCell.SNAPSHOT_AT_MS) / 1000) if version else -1.0
    heard_ms = board.control_plane[ControlPlaneCell.HEARTBEAT_MS]
    silent_s = max(0.0, now_s - heard_ms / 1000) if heard_ms else -1.0
    degraded = [
        f"worker {worker} uses Snapshot {versions[worker]}, because with Snapshot {given_up} more requests failed"
        for worker in live
        if (given_up := board.get(worker, WorkerCell.SNAPSHOT_RETURNED)) > versions[worker]
    ]
    degraded += [
        f"worker {worker} is not running"
        for worker in range(board.workers)
        if worker not in live and board.get(worker, WorkerCell.STARTS)
    ]
    for worker in live:
        degraded += overload_reasons(board, worker, now_s)
    if version and not 0 <= silent_s <= SILENT_S_MAX:
        heard = f"was not heard for {silent_s:.0f} s" if heard_ms else "was not heard since the start"
        degraded.append(f"the control plane {heard}; traffic goes on with Snapshot {version}, {age_s:.0f} s old")
    return MachineStatus(version, age_s, silent_s, tuple(degraded))


def overload_reasons(board: SharedMemory, worker: int, now_s: float) -> list[str]:
    """What a worker suffers from while it still serves, in sentences; none of it takes readiness away."""
    sentences = []
    still_s = now_s - board.get(worker, WorkerCell.HEARTBEAT_MS) / 1000
    if still_s > STILL_S:
        sentences.append(f"worker {worker} has not moved for {still_s:.1f} s")
    if now_s - board.get(worker, WorkerCell.LAG_AT_MS) / 1000 < LAG_SHOWN_S:
        sentences.append(f"worker {worker} stood still for {board.get(worker, WorkerCell.LAG_MS)} ms")
    if board.get(worker, WorkerCell.JOURNAL_SHORT):
        lost = board.get(worker, WorkerCell.ROWS_LOST)
        sentences.append(f"worker {worker} keeps accounts in memory, because the disk takes none; {lost} rows lost")
    short = OverloadBits(board.get(worker, WorkerCell.SHORT))
    return sentences + [f"worker {worker} is short of {what}" for each, what in _SHORT_OF.items() if each in short]


def running_workers(board: SharedMemory) -> list[int]:
    """The workers that there are now."""
    return [worker for worker in range(board.workers) if board.get(worker, WorkerCell.PID)]
