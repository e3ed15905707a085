"""The Endpoints of managed Deployments: those that the reconciler observes, and before that those of the last run."""

import asyncio
from collections.abc import Callable, Mapping

from fleetgate.core.model import Snapshot
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.providers.base import ManagedDeployment

CARRY_S = 5.0  # the reconciler finds replicas that survived a restart of this process well within this time


class ReplicaEndpoints:
    """Base URLs of ready replicas by Deployment.

    A control process that restarts while the workers serve must not remove replicas only because its reconciler has
    not observed them yet.
    """

    def __init__(self, observed: Callable[[], Mapping[str, tuple[str, ...]]]) -> None:
        self._observed = observed
        self._carried: Mapping[str, tuple[str, ...]] = {}

    def carry(
        self, last: Snapshot | None, managed: tuple[ManagedDeployment, ...], shared_memory: SharedMemory | None
    ) -> None:
        """Keep the replicas of the last Snapshot if workers serve from it."""
        if last is None or shared_memory is None:
            return
        if any(shared_memory.get(worker, WorkerCell.ACCEPTING) for worker in range(shared_memory.workers)):
            names = {deployment.name for deployment in managed}
            self._carried = {
                deployment.name: tuple(f"{one.origin}{one.base_path}" for one in deployment.endpoints)
                for deployment in last.deployments
                if deployment.name in names
            }

    def ready(self) -> Mapping[str, tuple[str, ...]]:
        """The base URLs to publish."""
        return {**self._carried, **{name: urls for name, urls in self._observed().items() if urls}}

    async def drop_carried(self, on_change: Callable[[], None]) -> None:
        """Drop the replicas of the last run after `CARRY_S`; from then on only observed replicas are published."""
        await asyncio.sleep(CARRY_S)
        self._carried = {}
        on_change()
        await asyncio.Event().wait()
