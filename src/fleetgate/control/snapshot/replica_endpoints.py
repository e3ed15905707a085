"""Where managed Deployments answer: what the reconciler sees, and until it has looked, what was true before."""

import asyncio
from collections.abc import Callable, Mapping

from fleetgate.core.model import Snapshot
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.providers.base import ManagedDeployment

CARRY_S = 5.0  # replicas that outlived a restart of this process are found again well within it


class ReplicaEndpoints:
    """Base URLs of ready replicas by Deployment.

    A control process that is started again while the workers serve must not take the replicas away that go on
    running, only because it has not looked yet.
    """

    def __init__(self, seen: Callable[[], Mapping[str, tuple[str, ...]]]) -> None:
        self._seen = seen
        self._carried: Mapping[str, tuple[str, ...]] = {}

    def carry(self, last: Snapshot | None, managed: tuple[ManagedDeployment, ...], board: SharedMemory | None) -> None:
        """Take over what the last Snapshot had, if workers are serving from it."""
        if last is None or board is None:
            return
        if any(board.get(worker, WorkerCell.ACCEPTING) for worker in range(board.workers)):
            names = {deployment.name for deployment in managed}
            self._carried = {
                deployment.name: tuple(f"{one.origin}{one.base_path}" for one in deployment.endpoints)
                for deployment in last.deployments
                if deployment.name in names
            }

    def ready(self) -> Mapping[str, tuple[str, ...]]:
        """What to publish now."""
        return {**self._carried, **{name: urls for name, urls in self._seen().items() if urls}}

    async def drop_carried(self, on_change: Callable[[], None]) -> None:
        """Forget, after a while, what was carried over; then only what is seen counts."""
        await asyncio.sleep(CARRY_S)
        self._carried = {}
        on_change()
        await asyncio.Event().wait()
