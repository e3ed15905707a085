"""What becomes an Event: Deployments that go up or down, workers that are started again, and what workers tell."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

import structlog

from fleetgate.core.model import Snapshot
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.shared_memory import ControlPlaneCell, EndpointSignal, SharedMemory, WorkerCell

WATCH_EVERY_S = 1.0
BEAT_EVERY_S = 0.5
log = structlog.get_logger()
Record = Callable[[str, str, str], None]


class EventRecorder:
    """Compares what it saw last with what it sees now. A Deployment is known from its first probe on."""

    def __init__(self, board: SharedMemory) -> None:
        self._board = board
        self._up: dict[tuple[str, int], bool] = {}
        self._starts = [board.get(worker, WorkerCell.STARTS) for worker in range(board.workers)]

    def changes(self, snapshot: Snapshot | None) -> Iterator[tuple[str, str, str]]:
        """Kind, name and sentence of everything that changed since the last look."""
        known: dict[tuple[str, int], bool] = {}
        for deployment in snapshot.deployments if snapshot else ():
            slots = [endpoint.slot for endpoint in deployment.endpoints]
            probed = [slot for slot in slots if self._board.signal(slot, EndpointSignal.SEEN_MS)]
            if not probed:
                continue
            up = any(slot not in probed or self._board.signal(slot, EndpointSignal.UP) for slot in slots)
            identity = (deployment.name, deployment.slot)
            known[identity] = up
            before = self._up.get(identity)
            if up and before is not True:
                again = " again" if before is False else ""
                yield "Deployment", deployment.name, f"Deployment {deployment.name} is up{again}: it answers its probe."
            elif not up and before is not False:
                count = f"none of its {len(slots)} Endpoints answers" if len(slots) > 1 else "it does not answer"
                yield "Deployment", deployment.name, f"Deployment {deployment.name} is down: {count} its probe."
        self._up = known
        yield from self._restarts()

    def _restarts(self) -> Iterator[tuple[str, str, str]]:
        for worker in range(self._board.workers):
            starts = self._board.get(worker, WorkerCell.STARTS)
            if starts > self._starts[worker] and starts > 1:
                yield "Worker", str(worker), f"Worker {worker} ended and was started again (start {starts})."
            self._starts[worker] = starts


async def beat(board: SharedMemory) -> None:
    """Tell the workers that the control plane lives, for as long as it does."""
    while True:
        board.control_plane[ControlPlaneCell.HEARTBEAT_MS] = int(time.monotonic() * 1000)
        await asyncio.sleep(BEAT_EVERY_S)


async def watch(
    watcher: EventRecorder, spool: EventSpool, snapshot: Callable[[], Snapshot | None], record: Record
) -> None:
    """Look about once a second, for as long as the process lives."""
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        changes = list(watcher.changes(snapshot()))
        await asyncio.to_thread(_record_all, changes, spool, record)


def _record_all(changes: Iterable[tuple[str, str, str]], spool: EventSpool, record: Record) -> None:
    for change in changes:
        record(*change)
    try:
        told = spool.take()
    except OSError as error:  # they stay where they are, and the next look tries again
        log.warning("spool_unreadable", reason=str(error))
        return
    for happened in told:
        record(happened.kind, happened.name, happened.message)
