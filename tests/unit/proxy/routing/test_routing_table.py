"""A Snapshot prepared for requests, and what lasts from one to the next."""

import msgspec
import pytest

from fleetgate.core.health.circuit_breaker import CONSECUTIVE_FAILURES_MAX, BreakerState, Signal
from fleetgate.core.model import Endpoint, Gateway, Policy, Resilience
from fleetgate.core.routing.route import RejectionReason
from fleetgate.protocols import clients
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.model_route import TRIAL_WAIT_S, ModelRouteState
from fleetgate.proxy.routing.routing_table import RoutingTable, request_heads
from tests.loopback.rig import deployment, gateway
from tests.unit.proxy.plane_rig import Plane

PATH = b"/v1/chat/completions"


def table_of(plane: Plane) -> RoutingTable:
    return plane.services.active.current


def route_of(plane: Plane) -> ModelRouteState:
    return table_of(plane).gateways[b"chat.test"].routes["m"]


def test_a_table_is_replaced_whole(plane: Plane) -> None:
    active, before = plane.services.active, table_of(plane)
    assert isinstance(active, ActiveTable)
    plane.take()
    assert active.current is not before and active.replace(before) is not before and active.current is before


def test_an_endpoint_that_stays_keeps_its_health_and_its_connections(plane: Plane) -> None:
    before = {one.spec.name: one.endpoints[0] for one in table_of(plane).deployments.values()}
    for _ in range(CONSECUTIVE_FAILURES_MAX):
        before["one"].record(Signal.UNREACHABLE, plane.loop.time(), 0.5)
    plane.take(count=3)
    after = {one.spec.name: one for one in table_of(plane).deployments.values()}
    assert after["one"].endpoints[0] is before["one"] and after["two"].endpoints[0] is before["two"]
    assert after["one"].endpoints[0].health.breaker is BreakerState.DOWN and after["one"].health == 0.0


def test_what_was_learned_of_a_changed_deployment_is_forgotten(plane: Plane) -> None:
    table_of(plane).deployments[0].set_retry_after(plane.loop.time() + 50.0)
    plane.take()
    assert table_of(plane).deployments[0].retry_after_until_s
    plane.take(each={"concurrency_max": 3})
    assert not table_of(plane).deployments[0].retry_after_until_s


def test_a_route_that_is_gone_has_a_successor_without_candidates(plane: Plane) -> None:
    before = route_of(plane)
    plane.take()
    assert table_of(plane).successor(before) is route_of(plane)
    plane.take(each={"models": {"other": "other"}})
    gone = table_of(plane).successor(before)
    assert gone.model == "m" and not gone.deployments and gone.lead is None


@pytest.mark.parametrize(
    ("fields", "has_lead"),
    [
        ({}, True),
        ({"resilience": Resilience(hedge="all")}, False),
        ({"policies": (Policy(name="p", require="true"),)}, False),
        ({"overflow_at": 0.8}, False),
        ({"strategy": "least_cost"}, False),
    ],
)
def test_there_is_a_lead_only_if_nothing_is_to_be_weighed(
    plane: Plane, fields: dict[str, object], has_lead: bool
) -> None:
    plane.take(**fields)  # type: ignore[arg-type]
    assert (route_of(plane).lead is not None) is has_lead


def test_a_route_waits_for_what_a_trial_shows(plane: Plane) -> None:
    route, now_s = route_of(plane), plane.loop.time()
    assert route.explain(RejectionReason.NONE_UP, (), now_s, now_s) is RejectionReason.NONE_UP
    route.deployments[0].endpoints[0].begin_trial(now_s)
    assert route.explain(RejectionReason.NONE_UP, (), now_s, now_s) is RejectionReason.ON_TRIAL
    assert route.explain(RejectionReason.NONE_UP, (0,), now_s, now_s) is RejectionReason.NONE_UP
    late_s = now_s + TRIAL_WAIT_S + 0.1
    assert route.explain(RejectionReason.NONE_UP, (), now_s, late_s) is RejectionReason.NONE_UP
    assert route.explain(RejectionReason.ALL_FULL, (), now_s, now_s) is RejectionReason.ALL_FULL
    route.deployments[0].endpoints[0].end_trial(has_content=False)


def test_a_route_wants_to_be_left_alone_only_if_all_do(plane: Plane) -> None:
    route, now_s = route_of(plane), plane.loop.time()
    first, second = route.deployments
    first.set_retry_after(now_s + 9.0)
    assert route.retry_after_s(now_s) == 0.0
    second.set_retry_after(now_s + 4.0)
    assert route.retry_after_s(now_s) == 4.0


def test_a_credential_is_in_the_heads_of_its_origin_alone() -> None:
    openai = clients.find("openai")
    endpoint = Endpoint(slot=0, scheme="https", host="2001:db8::1", port=443, base_path="/x")
    heads = request_heads(openai, endpoint, "sk-1")
    assert heads[PATH].startswith(b"POST /x/chat/completions HTTP/1.1\r\nhost: [2001:db8::1]\r\n")
    assert b"authorization: Bearer sk-1\r\n" in heads[PATH]
    other = msgspec.structs.replace(endpoint, port=8443)
    assert b"sk-1" not in b"".join(request_heads(openai, other, "").values())
    assert b"host: [2001:db8::1]:8443\r\n" in request_heads(openai, other, "")[PATH]


def test_the_only_gateway_is_the_default(plane: Plane) -> None:
    assert table_of(plane).default_gateway is table_of(plane).gateways[b"chat.test"]
    specs: list[Gateway] = [gateway("one"), gateway("one", slot=1, name="other")]
    snapshot = msgspec.structs.replace(table_of(plane).snapshot, gateways=tuple(specs))
    table = RoutingTable(snapshot, plane.services.builder, None, 0.0)
    assert table.default_gateway is None and set(table.gateways) == {b"chat.test", b"other.test"}
    assert deployment("one", 8001, 0) == table.deployments[0].spec
