"""Activates new routing tables: waiting requests move to the new one, sent requests end on the old one."""

from collections.abc import Callable

from fleetgate.core.exchange import Refuse
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.routing_table import RoutingTable

LOAD_FRESH_MS = 3_000  # three probes: an older signal counts as no signal, not as "full"


class TableActivator:
    """Activates tables in one worker, and updates the views of its Deployments."""

    def __init__(
        self,
        active: ActiveTable,
        shared: SharedMemory,
        worker: int,
        tracker: CapacityTracker,
        health: PassiveHealthChecker,
        registry: RequestRegistry,
    ) -> None:
        self._active = active
        self._shared = shared
        self._worker = worker
        self._tracker = tracker
        self._health = health
        self._registry = registry

    def activate(self, table: RoutingTable, revoked: Refuse, clock: Callable[[], float]) -> None:
        """Use a new table. Shape: with `revoked`, requests with a revoked key end if the key has `kill_streams`."""
        before = self._active.replace(table)
        kept = set(table.endpoints.values())
        for endpoint in before.endpoints.values():
            if endpoint not in kept:
                endpoint.pool.retire()
        self._tracker.use(table.snapshot)
        self.update_deployments(int(clock() * 1000), every_second=True)
        self._health.use(before, table)
        self._shared.set(self._worker, WorkerCell.SNAPSHOT_VERSION, table.version)
        self._shared.set(self._worker, WorkerCell.SNAPSHOT_AT_MS, int(table.snapshot.made_at_s * 1000))
        self._end_revoked(before, table, revoked)
        for request in self._registry.waiting:
            request.change_route()

    def _end_revoked(self, before: RoutingTable, table: RoutingTable, revoked: Refuse) -> None:
        """End requests in flight with a revoked key, if the key has `kill_streams`. faults.md row 64."""
        gone = {key.id for key in before.keys.values() if key.kill_streams and key.id not in table.keys}
        if gone:
            for request in [one for one in self._registry.in_flight if one.received.context.key.id in gone]:
                request.terminate(revoked)

    def update_deployments(self, now_ms: int, every_second: bool = False) -> None:
        """Update the views of Deployments after changes of health or load; once a second of all Deployments."""
        for deployment in self._active.current.deployments.values():
            before = deployment.health, deployment.external_in_flight, deployment.paused
            if deployment.health < 1.0:
                deployment.update_health(now_ms / 1000)
            self._read_load(deployment, now_ms)
            if deployment.retry_after_until_s:
                deployment.update_pause(now_ms / 1000)
            if every_second:
                self._read_resume_support(deployment)
            if every_second or (deployment.health, deployment.external_in_flight, deployment.paused) != before:
                self._tracker.update_view(deployment, now_ms)

    def _read_load(self, deployment: DeploymentState, now_ms: int) -> None:
        if len(deployment.endpoints) == 1:
            slot = deployment.endpoints[0].spec.slot
            is_fresh = now_ms - self._shared.signal(slot, EndpointSignal.LOAD_SEEN_MS) < LOAD_FRESH_MS
            deployment.set_external(self._shared.signal(slot, EndpointSignal.FOREIGN) if is_fresh else 0)

    def _read_resume_support(self, deployment: DeploymentState) -> None:
        slots = [endpoint.spec.slot for endpoint in deployment.endpoints]
        marks = {self._shared.signal(slot, EndpointSignal.TOKENS) for slot in slots}
        deployment.set_resume_support(
            prefill=all(self._shared.signal(slot, EndpointSignal.PREFILL) == 1 for slot in slots),
            token_mark=marks.pop() if len(marks) == 1 and not marks <= {0, 1} else 0,
        )
