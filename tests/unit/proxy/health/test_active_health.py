"""Probes of Endpoints, of their readiness and of what their engines can resume, on the in-memory network."""

import asyncio

import pytest

from fleetgate.core.health.circuit_breaker import BreakerState
from fleetgate.ipc.shared_memory import EndpointSignal
from fleetgate.proxy.health.active_health import RESPONSE_BYTES_MAX, HealthChecker, ProbeResponse
from fleetgate.proxy.health.poison_detector import PoisonDetector
from fleetgate.proxy.health.resume_probe import NO, UNKNOWN, YES, ResumeProbe
from fleetgate.proxy.transport.memory_network import RemoteEnd
from tests.conformance.transport_rig import DONE, FINISH, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane, status_of


def probing(plane: Plane, data: bytes) -> None:
    """Probe; engines answer this."""
    for engine in plane.engines:
        engine.on_connect = lambda remote: setattr(remote, "on_received", lambda end: end.send(data))
    assert isinstance(plane.services.prober, HealthChecker)
    plane.loop.create_task(plane.services.prober.run())
    plane.wait(3.0)


def test_an_endpoint_that_answers_is_up(plane: Plane) -> None:
    plane.take(each={"engine": "vllm"})
    probing(plane, whole(b""))
    assert plane.services.prober.is_prober
    assert [plane.shared.signal(slot, EndpointSignal.UP) for slot in (0, 1)] == [1, 1]
    assert b"GET /health HTTP/1.1\r\n" in plane.engines[0].connections[0].received


def test_an_endpoint_that_fails_its_probes_is_down_and_its_requests_move(plane: Plane) -> None:
    plane.take(each={"engine": "vllm"})
    client = plane.ask(stream=True)
    plane.engines[0].error = ConnectionRefusedError("refused")
    plane.loop.create_task(plane.services.prober.run())
    plane.wait(6.0)
    assert plane.shared.signal(0, EndpointSignal.UP) == 0
    endpoint = plane.services.active.current.deployments[0].endpoints[0]
    assert endpoint.health.breaker is BreakerState.DOWN
    assert b"POST " in b"".join(one.received for one in plane.engines[1].connections)
    client.reset()
    plane.run()


def test_the_load_of_an_engine_is_read(plane: Plane) -> None:
    plane.take(each={"engine": "vllm"})
    probing(plane, whole(b"vllm:num_requests_running 5\nvllm:num_requests_waiting 2\n"))
    assert plane.shared.signal(0, EndpointSignal.RUNNING) == 5 and plane.shared.signal(0, EndpointSignal.WAITING) == 2
    assert plane.shared.signal(0, EndpointSignal.FOREIGN) == 7, "none of them is ours"


@pytest.mark.parametrize(
    "data",
    [b"x" * (RESPONSE_BYTES_MAX + 1), b"HTTP/1.1 banana\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"],
)
def test_a_probe_ends_whatever_comes(plane: Plane, data: bytes) -> None:
    response = ProbeResponse(plane.loop)
    response.on_data(data)
    response.on_lost(None)
    assert response.result.done() and response.result.exception() is not None


def test_an_answer_that_ends_with_its_connection_is_whole(plane: Plane) -> None:
    response = ProbeResponse(plane.loop)
    response.on_data(b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert not response.result.done()
    response.on_lost(None)
    assert response.result.result()[1] == b"abc"


@pytest.mark.parametrize(("rest", "mark"), [(" salt and light", YES), ("xyz", NO)])
def test_an_engine_that_continues_its_own_answer_may_resume(plane: Plane, rest: str, mark: int) -> None:
    plane.take(count=1, each={"engine": "vllm"})
    said = "the sea is full of salt and light"

    def answer(end: RemoteEnd) -> None:
        text = rest if b'"assistant"' in end.received else said
        end.send(streamed(content(text), FINISH, DONE))

    def connect(end: RemoteEnd) -> None:
        end.on_received = answer

    plane.engines[0].on_connect = connect
    plane.services.prober.is_prober = True
    plane.shared.set_signal(0, EndpointSignal.UP, 1)
    assert isinstance(plane.services.resume_probe, ResumeProbe)
    assert plane.shared.signal(0, EndpointSignal.PREFILL) == UNKNOWN
    plane.loop.create_task(plane.services.resume_probe.run())
    plane.wait(2.0)
    assert plane.shared.signal(0, EndpointSignal.PREFILL) == mark and not plane.in_flight()


# --- requests that engines go down with ---


def test_a_request_that_two_engines_go_down_with_is_not_sent_a_third_time(plane: Plane) -> None:
    plane.take(count=3)
    assert isinstance(plane.services.handler_services.effects.poison, PoisonDetector)
    for number in range(3):  # each engine has answered before
        plane.services.active.current.deployments[number].ended_count = 1
    client = plane.ask()
    for number in range(2):
        plane.engines[number].error = ConnectionRefusedError("refused")
        plane.engine(number).reset()
        plane.run()
    plane.wait(0.5)
    assert status_of(client) == 502 and b"poison_request" in client.received and not plane.engines[2].dials


def test_one_engine_of_two_that_is_up_again_clears_the_request(plane: Plane) -> None:
    plane.take(count=3)
    for number in range(3):
        plane.services.active.current.deployments[number].ended_count = 1
    client = plane.ask()
    for number in range(2):
        plane.engine(number).reset()
        plane.run()
    plane.wait(0.5)
    assert plane.engines[2].dials == 1
    plane.answer(plane.engine(2), whole(b'{"choices":[]}'))
    assert status_of(client) == 200 and asyncio.all_tasks(plane.loop) == set()
