"""Sets and removes injected faults on the connection pools of one worker."""

from collections.abc import Callable

from fleetgate.core.fault_injection import Fault
from fleetgate.proxy.routing.routing_table import RoutingTable
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.transport.fault_injection import ActiveFaults

COUNTER = "fleetgate_injected_faults_total"


class FaultSwitch:
    """One worker's injected faults. Shape: `in_force` returns the faults that are in force now.

    Each worker checks for itself when a fault ends, so that a fault ends even if the control plane is dead.
    """

    def __init__(self, in_force: Callable[[], tuple[Fault, ...]], metrics: WorkerMetrics) -> None:
        self._in_force = in_force
        self._metrics = metrics
        self._faults: tuple[Fault, ...] = ()
        self._table: RoutingTable | None = None

    def check(self, table: RoutingTable) -> None:
        """Apply changes. Called ten times a second. Cost: 2 µs without faults."""
        faults = self._in_force()
        if faults == self._faults and (not faults or table is self._table):
            return
        self._faults, self._table = faults, table
        for deployment in table.deployments.values():
            of_deployment = tuple(fault for fault in faults if fault.deployment == deployment.spec.name)
            for endpoint in deployment.endpoints:
                endpoint.pool.faults = ActiveFaults(of_deployment, self._count) if of_deployment else None

    def _count(self, fault: Fault) -> None:
        labels = {"fault": fault.name, "deployment": fault.deployment, "kind": fault.kind.value}
        self._metrics.cells[self._metrics.counter(COUNTER, labels)] += 1
