"""The health of an Endpoint in one worker, and the switch of injected faults."""

from types import SimpleNamespace
from typing import cast

import pytest

from fleetgate.core.capacity.units import SLOW_START_MIN
from fleetgate.core.fault_injection import Fault, FaultKind
from fleetgate.core.health.circuit_breaker import BreakerState, Signal
from fleetgate.core.model import Endpoint
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.fault_switch import COUNTER, FaultSwitch
from fleetgate.proxy.routing.routing_table import RoutingTable
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.transport.connection_pool import ConnectionPool

ENDPOINT = Endpoint(slot=0, scheme="http", host="127.0.0.1", port=80, base_path="/v1")
NOW_S = 1000.0


@pytest.fixture
def state() -> EndpointState:
    return EndpointState(ENDPOINT, ConnectionPool(ENDPOINT, None, None))


def eject(state: EndpointState) -> None:
    while state.health.breaker is BreakerState.CLOSED:
        state.record(Signal.UNREACHABLE, NOW_S, 0.5)


def test_a_healthy_endpoint_takes_its_whole_load(state: EndpointState) -> None:
    assert state.fitness(NOW_S) == 1.0
    assert not state.record(Signal.WENT_WELL, NOW_S, 0.5), "nothing changed"


def test_an_ejected_one_takes_nothing_and_then_one_trial_more_for_each_that_brought_content(
    state: EndpointState,
) -> None:
    eject(state)
    assert state.fitness(NOW_S) == 0.0
    later_s = NOW_S + 600.0
    assert state.fitness(later_s) == SLOW_START_MIN
    state.begin_trial(later_s)
    assert state.fitness(later_s) == 0.0
    state.end_trial(has_content=True)
    state.begin_trial(later_s)
    assert state.fitness(later_s) == SLOW_START_MIN
    state.begin_trial(later_s)
    assert state.fitness(later_s) == 0.0


def test_a_change_of_state_forgets_the_trials_before_it(state: EndpointState) -> None:
    state.begin_trial(NOW_S)
    state.end_trial(has_content=True)
    eject(state)
    assert state.trials_passed == 0


def test_outliers_are_kept_by_the_size_of_requests(state: EndpointState) -> None:
    assert state.slowness_of(0) is state.slowness_of(0) is not state.slowness_of(12)


class Metrics:
    """Counters by name and labels."""

    def __init__(self) -> None:
        self.cells: dict[str, int] = {}

    def counter(self, name: str, labels: dict[str, str]) -> str:
        key = f"{name} {sorted(labels.items())}"
        self.cells.setdefault(key, 0)
        return key


def fault(deployment: str) -> Fault:
    return Fault(name="f", kind=FaultKind.REFUSE, deployment=deployment, share=1.0, begins_s=0.0, ends_s=1e12)


def table(*deployments: str) -> RoutingTable:
    """What a switch reads of a table: Deployments with one Endpoint each."""
    deployments_by_slot = {
        slot: SimpleNamespace(
            spec=SimpleNamespace(name=name),
            endpoints=[EndpointState(ENDPOINT, ConnectionPool(ENDPOINT, None, None))],
        )
        for slot, name in enumerate(deployments)
    }
    return cast(RoutingTable, SimpleNamespace(deployments=deployments_by_slot))


def pools(of: RoutingTable) -> list[ConnectionPool]:
    return [deployment.endpoints[0].pool for deployment in of.deployments.values()]


def test_a_fault_is_put_on_its_deployment_alone_and_taken_off() -> None:
    faults: list[Fault] = []
    metrics = Metrics()
    switch = FaultSwitch(lambda: tuple(faults), cast(WorkerMetrics, metrics))
    old, new = table("one", "two"), table("one", "two")
    switch.check(old)
    assert not any(pool.faults for pool in pools(old))
    faults.append(fault("one"))
    switch.check(old)
    assert [pool.faults is not None for pool in pools(old)] == [True, False]
    switch.check(new)
    assert [pool.faults is not None for pool in pools(new)] == [True, False], "a new Snapshot has new pools"
    assert pools(new)[0].take_idle() is None
    (counted,) = metrics.cells.items()
    assert counted[0].startswith(COUNTER) and "refuse" in counted[0] and counted[1] == 1
    faults.clear()
    switch.check(new)
    assert not any(pool.faults for pool in pools(new))
