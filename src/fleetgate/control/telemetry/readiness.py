"""The content of `/readyz`: whether Fleetgate is ready, the reasons if not, and what is degraded."""

from typing import Any

from fleetgate.control.context import StartedProcess
from fleetgate.core.model import Snapshot
from fleetgate.ipc.machine_status import machine_status
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell

# A Snapshot that a worker used and then gave up has been in use; `degraded` names it.
_VERSION_CELLS = (WorkerCell.SNAPSHOT_VERSION, WorkerCell.SNAPSHOT_RETURNED)
PROBE_WAIT_S = 2.0  # then a Deployment that does not answer no longer delays readiness


def reasons_against(
    shared_memory: SharedMemory | None, serving: int, snapshot: Snapshot | None, started: StartedProcess, now_s: float
) -> list[str]:
    """Why Fleetgate is not ready; empty when `serving` workers accept with the configuration given at start."""
    if shared_memory is None or snapshot is None or not started.version:
        return ["the configuration is not published yet"]
    reasons = []
    workers = range(shared_memory.workers)
    accepting = [worker for worker in workers if shared_memory.get(worker, WorkerCell.ACCEPTING) == 1]
    if len(accepting) < serving:
        reasons.append(f"{len(accepting)} of {serving} workers accept connections")
    for worker in accepting:
        if max(shared_memory.get(worker, cell) for cell in _VERSION_CELLS) < started.version:
            reasons.append(f"worker {worker} does not use Snapshot {started.version} yet")
    if now_s - started.at_s < PROBE_WAIT_S:
        for deployment in snapshot.deployments:
            slots = [endpoint.slot for endpoint in deployment.endpoints]
            if not any(shared_memory.signal(slot, EndpointSignal.SEEN_MS) > 0 for slot in slots):
                reasons.append(f"Deployment {deployment.name} is not probed yet")
    return reasons


def degradations(shared_memory: SharedMemory | None, refusal: str, now_s: float, epoch_s: float) -> dict[str, Any]:
    """What is wrong although requests are served, and the Snapshot's version and age."""
    refusals = [refusal] if refusal else []
    if shared_memory is None:
        return {"degraded": refusals}
    machine = machine_status(shared_memory, now_s, epoch_s)
    return {
        "degraded": [*refusals, *machine.degraded],
        "snapshot": {"version": machine.version, "age_s": round(machine.age_s, 1)},
    }
