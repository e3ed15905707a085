"""When Fleetgate says that it is ready, and why not yet."""

from typing import Any

from fleetgate.control.context import StartedProcess
from fleetgate.core.model import Snapshot
from fleetgate.ipc.machine_status import machine_status
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell

_KNOWN = (
    WorkerCell.SNAPSHOT_VERSION,
    WorkerCell.SNAPSHOT_RETURNED,
)  # what was given up was taken up, and is told elsewhere
PROBE_WAIT_S = 2.0  # a dead upstream must not hold readiness back: DESIGN.md section 3


def reasons_against(
    board: SharedMemory | None, serving: int, snapshot: Snapshot | None, started: StartedProcess, now_s: float
) -> list[str]:
    """Why not ready, in sentences; empty when `serving` workers accept with the configuration given at start."""
    if board is None or snapshot is None or not started.version:
        return ["the configuration is not published yet"]
    reasons = []
    accepting = [worker for worker in range(board.workers) if board.get(worker, WorkerCell.ACCEPTING) == 1]
    if len(accepting) < serving:
        reasons.append(f"{len(accepting)} of {serving} workers accept connections")
    for worker in accepting:
        if max(board.get(worker, cell) for cell in _KNOWN) < started.version:
            reasons.append(f"worker {worker} has not taken up Snapshot {started.version}")
    if now_s - started.at_s < PROBE_WAIT_S:
        for deployment in snapshot.deployments:
            probed = any(board.signal(endpoint.slot, EndpointSignal.SEEN_MS) > 0 for endpoint in deployment.endpoints)
            if not probed:
                reasons.append(f"Deployment {deployment.name} was not probed yet")
    return reasons


def degradations(board: SharedMemory | None, refusal: str, now_s: float, epoch_s: float) -> dict[str, Any]:
    """What is not as it should be though traffic goes on, and the Snapshot's age."""
    if board is None:
        return {"degraded": [refusal] if refusal else []}
    standing = machine_status(board, now_s, epoch_s)
    return {
        "degraded": [*([refusal] if refusal else []), *standing.degraded],
        "snapshot": {"version": standing.version, "age_s": round(standing.age_s, 1)},
    }
