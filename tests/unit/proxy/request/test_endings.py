"""Requests that are ended by something else than their engine or their client, and the bytes that say so."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetgate.core.api_keys import hmac_hex, mint_key, parse_key
from fleetgate.core.model import Admission, Key, Policy
from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.proxy.request.handler import RequestHandler
from fleetgate.proxy.transport.memory_network import RemoteEnd
from fleetgate.proxy.worker.drain import AT_ONCE, DrainPolicy, stopping
from tests.conformance.transport_rig import BODY, DONE, FINISH, ROLE, STREAM_HEAD, chunked, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane, code_of, header_of, plane_in, status_of

LIMIT = {"concurrency_max": 1, "concurrency_written": True}
ANSWER = streamed(ROLE, content("a"), FINISH, DONE)
TOKEN = mint_key("test", b"i" * 7, b"s" * 32)
CREDENTIAL = b"authorization: Bearer %b\r\n" % TOKEN.encode()
URGENT = Policy(name="urgent", when="request.headers['x-urgent'] == '1'", priority="critical")


def key(kill_streams: bool = True) -> Key:
    """The only client key."""
    parsed = parse_key(TOKEN.encode())
    assert parsed is not None
    return Key(id=parsed[0], name="k", secret_hmac=hmac_hex(b"p" * 32, parsed[1]), kill_streams=kill_streams)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[Plane]:
    with plane_in(tmp_path, auth="keys") as made:
        made.take(keys=(key(),))
        yield made


# --- a key is revoked ---


def test_a_revoked_key_ends_what_has_not_begun_with_401(keyed: Plane) -> None:
    client = keyed.ask(headers=CREDENTIAL)
    keyed.take(keys=())
    assert (status_of(client), code_of(client)) == (401, "invalid_api_key")
    assert client.is_closed and keyed.engine(0).is_aborted
    assert keyed.settlements() == [("one", "refused")]
    assert keyed.usage()[-1]["billed_prompt_tokens"] == 0


def test_a_revoked_key_ends_a_stream_with_an_error(keyed: Plane) -> None:
    client = keyed.ask(stream=True, headers=CREDENTIAL)
    keyed.answer(keyed.engine(0), STREAM_HEAD + chunked(ROLE, content("a")))
    keyed.take(keys=())
    assert b"invalid_api_key" in client.received and client.is_closed
    assert DONE not in client.received and not client.received.endswith(b"0\r\n\r\n")


def test_a_revoked_key_ends_what_waits(keyed: Plane) -> None:
    keyed.take(count=1, each=LIMIT, keys=(key(),))
    first, second = (keyed.ask(headers=CREDENTIAL) for _ in range(2))
    keyed.take(count=1, each=LIMIT, keys=())
    assert status_of(first) == status_of(second) == 401 and not keyed.services.registry.has_waiting


def test_without_kill_streams_what_was_accepted_goes_on(keyed: Plane) -> None:
    keyed.take(keys=(key(kill_streams=False),))
    client = keyed.ask(headers=CREDENTIAL)
    keyed.take(keys=())
    keyed.answer(keyed.engine(0), whole(BODY))
    assert status_of(client) == 200
    assert status_of(keyed.ask(headers=CREDENTIAL)) == 401


# --- the Snapshot changes ---


def test_a_request_that_waits_moves_over_to_the_new_snapshot(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT)
    first, second = plane.ask(), plane.ask()
    plane.take(count=2, each=LIMIT)
    plane.answer(plane.engine(1), whole(BODY))
    assert header_of(second, "x-fleetgate-deployment") == "two"
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(first) == 200


def test_a_request_that_waits_for_a_model_that_is_gone_is_refused(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT)
    first, second = plane.ask(), plane.ask()
    plane.take(count=1, each={"models": {"other": "other"}})
    assert (status_of(second), code_of(second)) == (503, "no_deployment_available")
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(first) == 200, "what was sent ends on the table that it began with"


# --- the queue is full ---


def test_a_more_urgent_request_takes_the_place_of_another(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT, admission=Admission(queue_max=1), policies=(URGENT,))
    first, second = plane.ask(), plane.ask()
    urgent = plane.ask(headers=b"x-urgent: 1\r\n")
    assert (status_of(second), code_of(second)) == (429, "queue_full") and not urgent.received
    for client in (first, urgent):
        plane.answer(plane.engine(0), whole(BODY))
        assert status_of(client) == 200


# --- the worker leaves ---


def drain(plane: Plane, policy: DrainPolicy) -> "asyncio.Task[None]":
    task = plane.loop.create_task(plane.services.drain.run([], lambda: policy, has_tls=False))
    plane.run()
    return task


def test_a_worker_that_leaves_lets_answers_end_and_closes_their_connections(plane: Plane) -> None:
    client, idle = plane.ask(), plane.connect()
    leaving = drain(plane, stopping(lb_grace_s=0.0, grace_s=5.0))
    assert plane.shared.get(0, WorkerCell.ACCEPTING) == 0
    plane.wait(1.0)
    assert idle.is_closed and not leaving.done()
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(client) == 200 and header_of(client, "connection") == "close" and client.is_closed
    plane.wait(0.2)
    assert leaving.done()


@pytest.mark.parametrize("stream", [False, True])
def test_what_has_not_ended_in_the_grace_is_ended(plane: Plane, stream: bool) -> None:
    client = plane.ask(stream=stream)
    if stream:
        plane.answer(plane.engine(0), STREAM_HEAD + chunked(content("a")))
    leaving = drain(plane, AT_ONCE)
    plane.wait(0.2)
    assert leaving.done() and client.is_closed and b"shutting_down" in client.received
    assert status_of(client) == (200 if stream else 503)
    assert plane.engine(0).is_aborted


# --- a bug of ours ---


def failing(*arguments: object) -> None:
    raise RuntimeError("a bug")


def internal_errors(plane: Plane) -> int:
    return plane.metric("fleetgate_internal_errors_total")


def is_reported(client: RemoteEnd) -> bool:
    return b"internal_error" in client.received


@pytest.mark.parametrize("phase", ["start", "on_content", "on_lost"])
def test_an_internal_error_before_content_is_a_500(plane: Plane, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    other = plane.ask()
    with monkeypatch.context() as patch:
        patch.setattr(RequestHandler, phase, failing)
        client = plane.ask()
        if phase != "start":
            engine = plane.engines[0].connections[1]
            plane.answer(engine, whole(BODY)) if phase == "on_content" else engine.reset()
            plane.run()
        assert (status_of(client), code_of(client)) == (500, "internal_error")
    assert internal_errors(plane) == 1 and plane.in_flight() == 1
    plane.answer(plane.engines[0].connections[0], whole(BODY))
    assert status_of(other) == 200, "it ends this request alone"
    plane.wait(2.0)
    assert client.is_closed


def test_an_internal_error_inside_a_stream_is_an_error_event(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    client = plane.ask(stream=True)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(content("a")))
    with monkeypatch.context() as patch:
        patch.setattr(RequestHandler, "tick", failing)
        plane.wait(0.1)
    assert status_of(client) == 200 and is_reported(client) and DONE not in client.received
    assert internal_errors(plane) == 1 and not plane.in_flight() and plane.engine(0).is_aborted
    plane.wait(2.0)
    assert client.is_closed


# --- HTTP/1.0 and HEAD ---


def test_to_http10_an_unfinished_answer_ends_with_a_reset(plane: Plane) -> None:
    client = plane.ask(stream=True, version=b"1.0")
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a")))
    assert b"transfer-encoding" not in client.received and client.received.endswith(ROLE + content("a"))
    plane.engine(0).reset()
    plane.run()
    assert client.is_closed and b"upstream_interrupted" in client.received
    whole_answer = plane.ask(stream=True, version=b"1.0")
    plane.answer(plane.engines[0].connections[-1], ANSWER)
    assert whole_answer.received.endswith(DONE) and whole_answer.is_closed


def test_requests_of_one_connection_are_answered_in_order(plane: Plane) -> None:
    client = plane.ask()
    plane.ask_again(client)
    assert plane.in_flight() == 1, "one request at a time"
    plane.answer(plane.engine(0), whole(BODY))
    plane.answer(plane.engine(0), whole(BODY))
    assert client.received.count(b"HTTP/1.1 200 OK") == 2 and not client.is_closed
