"""What a lost attempt means for an Endpoint, its neighbours and those that wait for it."""

import pytest

from fleetgate.core.exchange import Failure
from fleetgate.core.health.circuit_breaker import CONSECUTIVE_FAILURES_MAX, BreakerState, Signal
from fleetgate.proxy.health.event_messages import EVENT_EVERY_S, model_missing_message
from fleetgate.proxy.health.passive_health import (
    MODEL_MISSING_S,
    PANIC_EVERY_S,
    SIGNALS,
    FailedAttempt,
    PassiveHealthChecker,
    least_bad,
)
from fleetgate.proxy.routing.endpoint_state import EndpointState
from tests.unit.proxy.request.handler_rig import Bench

PATH = b"/v1/chat/completions"


class Case:
    """Health on a bench without requests."""

    def __init__(self, count: int = 2) -> None:
        self.bench = Bench(count)
        self.health: PassiveHealthChecker = self.bench._health
        self.table = self.bench.active.current
        self.endpoints: list[EndpointState] = [one.endpoints[0] for one in self.table.deployments.values()]

    def lose(self, at: int, failure: Failure, times: int = 1) -> tuple[EndpointState, ...]:
        failed = FailedAttempt(self.endpoints[at], failure, self.table.routes[0], PATH)
        return [self.health.report_failure(failed) for _ in range(times)][-1]

    def breakers(self) -> list[BreakerState]:
        return [endpoint.health.breaker for endpoint in self.endpoints]

    def events(self) -> list[str]:
        return [event.message for event in self.bench.spool.events]


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.mark.parametrize("failure", SIGNALS)
def test_an_endpoint_that_fails_again_and_again_is_ejected(case: Case, failure: Failure) -> None:
    case.lose(0, failure, CONSECUTIVE_FAILURES_MAX - 1)
    assert case.breakers() == [BreakerState.CLOSED] * 2
    case.lose(0, failure)
    assert case.breakers()[0] in (BreakerState.OPEN, BreakerState.DOWN) and case.breakers()[1] is BreakerState.CLOSED
    assert case.table.deployments[0].health == 0.0 and "ejected for" in case.events()[0]
    assert case.bench.shared.ejected_until_ms[0] > case.bench.now_s * 1000, "the other workers are told"


@pytest.mark.parametrize("failure", [Failure.FULL, Failure.MISMATCH, Failure.POISON])
def test_what_is_no_fault_of_the_endpoint_changes_nothing(case: Case, failure: Failure) -> None:
    assert case.lose(0, failure, 20) == () and case.breakers() == [BreakerState.CLOSED] * 2


def test_a_refused_credential_is_that_of_the_whole_deployment(case: Case) -> None:
    assert case.lose(0, Failure.CREDENTIAL) == (case.endpoints[0],)
    assert case.breakers()[0] is BreakerState.DENIED and "credential" in case.events()[0]


def test_a_missing_model_is_remembered_for_its_path(case: Case) -> None:
    case.lose(0, Failure.MODEL_MISSING)
    route, now_s = case.table.routes[0], case.bench.now_s
    assert route.slots_without_model(PATH, now_s) == [0] and not route.slots_without_model(b"/v1/other", now_s)
    assert not route.slots_without_model(PATH, now_s + MODEL_MISSING_S + 0.1)
    assert case.events() == [model_missing_message(case.table.deployments[0].spec, "m", PATH.decode())]


def test_an_ejection_of_another_worker_is_followed(case: Case) -> None:
    other = Case()
    other.lose(0, Failure.UNREACHABLE, CONSECUTIVE_FAILURES_MAX)
    case.bench.shared.ejected_until_ms[0] = other.bench.shared.ejected_until_ms[0]
    case.health.tick(case.bench.now_s, every_second=False)
    assert case.breakers() == [BreakerState.DOWN, BreakerState.CLOSED]


def test_with_all_ejected_each_is_tried_once_a_second_the_reachable_first(case: Case) -> None:
    case.lose(0, Failure.UNREACHABLE, CONSECUTIVE_FAILURES_MAX)
    case.lose(1, Failure.BROKEN, CONSECUTIVE_FAILURES_MAX)
    assert least_bad(case.endpoints) is case.endpoints[1] and least_bad([]) is None
    route, now_s = case.table.routes[0], case.bench.now_s
    assert not case.health.panic_pick(route, now_s, without=(0, 1))
    assert case.health.panic_pick(route, now_s) and case.breakers()[1] is BreakerState.HALF_OPEN
    case.lose(1, Failure.BROKEN)
    assert case.breakers()[1] is BreakerState.OPEN
    assert case.health.panic_pick(route, now_s) and case.breakers()[0] is BreakerState.HALF_OPEN
    assert not case.health.panic_pick(route, now_s), "it was tried within this second"
    assert case.health.panic_pick(route, now_s + PANIC_EVERY_S) and case.breakers()[1] is BreakerState.HALF_OPEN


def test_a_full_engine_is_left_alone_for_as_long_as_it_asks(case: Case) -> None:
    deployment = case.table.deployments[0]
    case.health.apply_retry_after(deployment, 7.0)
    assert deployment.paused and deployment.retry_after_until_s == case.bench.now_s + 7.0
    assert case.bench.shared.retry_after_until(0) == int((case.bench.now_s + 7.0) * 1000)


def test_requests_that_wait_look_again_when_an_endpoint_returns(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(case.bench.registry, "wake_soon", lambda: called.append("wake"))
    case.lose(0, Failure.UNREACHABLE, CONSECUTIVE_FAILURES_MAX)
    assert not called
    case.bench.now_s += 60.0
    case.health.record(case.endpoints[0], Signal.PROBE_WELL)
    assert called and case.breakers()[0] in (BreakerState.HALF_OPEN, BreakerState.CLOSED)


def test_events_of_one_kind_are_told_every_30_s(case: Case) -> None:
    spec = case.table.deployments[0].spec
    events = case.health._events
    for kind in ("a", "a", "b"):
        events.emit(spec, kind, kind)
    case.bench.now_s += EVENT_EVERY_S
    events.emit(spec, "a", "a")
    assert case.events() == ["a", "b", "a"]
