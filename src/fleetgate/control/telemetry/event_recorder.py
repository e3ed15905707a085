"""Turns changes in shared memory into Events: Deployments that go up or down, workers that are restarted."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

import structlog

from fleetgate.core.model import Deployment, Snapshot
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.shared_memory import ControlPlaneCell, EndpointSignal, SharedMemory, WorkerCell

CHECK_EVERY_S = 1.0
HEARTBEAT_EVERY_S = 0.5
log = structlog.get_logger()
Record = Callable[[str, str, str], None]


class EventRecorder:
    """Compares the state of Deployments and workers with that of the last check.

    A Deployment has a state from the first probe of one of its Endpoints on.
    """

    def __init__(self, shared_memory: SharedMemory) -> None:
        self._shared_memory = shared_memory
        self._up: dict[tuple[str, int], bool] = {}
        self._starts = [shared_memory.get(worker, WorkerCell.STARTS) for worker in range(shared_memory.workers)]

    def changes(self, snapshot: Snapshot | None) -> Iterator[tuple[str, str, str]]:
        """Kind, name and sentence of every change since the last call."""
        states: dict[tuple[str, int], bool] = {}
        for deployment in snapshot.deployments if snapshot else ():
            up = self._is_up(deployment)
            if up is None:
                continue
            identity = (deployment.name, deployment.slot)
            states[identity] = up
            before = self._up.get(identity)
            if up and before is not True:
                yield "Deployment", deployment.name, _up_sentence(deployment, again=before is False)
            elif not up and before is not False:
                yield "Deployment", deployment.name, _down_sentence(deployment)
        self._up = states
        yield from self._restarts()

    def _is_up(self, deployment: Deployment) -> bool | None:
        """Whether any Endpoint is up; one that was not probed yet counts as up. None before the first probe."""
        signal = self._shared_memory.signal
        slots = [endpoint.slot for endpoint in deployment.endpoints]
        probed = [slot for slot in slots if signal(slot, EndpointSignal.SEEN_MS)]
        if not probed:
            return None
        return any(slot not in probed or signal(slot, EndpointSignal.UP) for slot in slots)

    def _restarts(self) -> Iterator[tuple[str, str, str]]:
        for worker in range(self._shared_memory.workers):
            starts = self._shared_memory.get(worker, WorkerCell.STARTS)
            if starts > self._starts[worker] and starts > 1:
                yield "Worker", str(worker), f"Worker {worker} ended and was restarted (start {starts})."
            self._starts[worker] = starts


def _up_sentence(deployment: Deployment, again: bool) -> str:
    return f"Deployment {deployment.name} is up{' again' if again else ''}: it answers its readiness probe."


def _down_sentence(deployment: Deployment) -> str:
    count = len(deployment.endpoints)
    one = "it does not answer the readiness probe; it gets no requests until it does"
    many = f"none of its {count} Endpoints answers the readiness probe; it gets no requests until one does"
    return f"Deployment {deployment.name} is down: {many if count > 1 else one}."


async def heartbeat(shared_memory: SharedMemory) -> None:
    """Show the workers that the control plane runs, until cancelled."""
    while True:
        shared_memory.control_plane[ControlPlaneCell.HEARTBEAT_MS] = int(time.monotonic() * 1000)
        await asyncio.sleep(HEARTBEAT_EVERY_S)


async def record_changes(
    recorder: EventRecorder, spool: EventSpool, snapshot: Callable[[], Snapshot | None], record: Record
) -> None:
    """Record every change, and the Events that workers left in the spool, once a second until cancelled."""
    while True:
        await asyncio.sleep(CHECK_EVERY_S)
        changes = list(recorder.changes(snapshot()))
        await asyncio.to_thread(_record_all, changes, spool, record)


def _record_all(changes: Iterable[tuple[str, str, str]], spool: EventSpool, record: Record) -> None:
    for change in changes:
        record(*change)
    try:
        spooled = spool.take()
    except OSError as error:  # they stay in the spool until the next check
        log.warning("spool_unreadable", reason=str(error))
        return
    for event in spooled:
        record(event.kind, event.name, event.message)
