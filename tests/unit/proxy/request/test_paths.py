"""The paths of a request through a worker: where it is placed, when it moves, how it is refused, and what it leaves."""

from typing import Any

import pytest

from fleetgate.core.model import Admission, Resilience, Slo
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.transport.memory_network import RemoteEnd
from tests.conformance.transport_rig import BODY, DONE, FINISH, ROLE, STREAM_HEAD, chunked, content, streamed, whole
from tests.unit.proxy.plane_rig import Plane, code_of, header_of, status_of

LIMIT = {"concurrency_max": 1, "concurrency_written": True}
FULL = whole(b'{"error":{"message":"busy"}}', b"429 Too Many Requests")
ANSWER = streamed(ROLE, content("a"), content("b"), FINISH, DONE)
DEPLOYMENT = "x-fleetgate-deployment"


def serve(plane: Plane, client: RemoteEnd, engine: RemoteEnd) -> None:
    """The engine answers, and the client gets exactly that."""
    plane.answer(engine, whole(BODY))
    assert status_of(client) == 200 and client.received.endswith(BODY)


# --- placed ---


def test_the_lead_takes_a_request_without_a_decision(plane: Plane) -> None:
    client = plane.ask()
    assert plane.in_flight() == 1 and not plane.shared.work[1], "no token work is counted for it"
    serve(plane, client, plane.engine(0))
    assert header_of(client, DEPLOYMENT) == "one" and header_of(client, "x-fleetgate-attempts") == "1"
    assert plane.settlements() == [("one", "ok")]


def test_the_scheduler_places_what_the_lead_cannot_take(plane: Plane) -> None:
    plane.take(each=LIMIT)
    first, second = plane.ask(), plane.ask()
    assert plane.in_flight() == 2
    serve(plane, second, plane.engine(1))
    serve(plane, first, plane.engine(0))
    assert header_of(second, DEPLOYMENT) == "two" and plane.settlements() == [("two", "ok"), ("one", "ok")]


def test_a_queued_request_gets_the_slot_that_becomes_free(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT)
    first, second = plane.ask(), plane.ask()
    assert plane.in_flight() == 1 and plane.services.registry.has_waiting and not second.received
    serve(plane, first, plane.engine(0))
    assert plane.in_flight() == 1 and not plane.services.registry.has_waiting
    serve(plane, second, plane.engine(0))


def test_those_that_wait_are_served_in_order(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT)
    clients = [plane.ask() for _ in range(5)]
    for client in clients:
        assert [bool(one.received) for one in clients].count(True) == clients.index(client)
        serve(plane, client, plane.engine(0))


# --- not placed ---


def test_a_full_queue_refuses(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT, admission=Admission(queue_max=1))
    first, second, third = plane.ask(), plane.ask(), plane.ask()
    assert (status_of(third), code_of(third)) == (429, "queue_full") and header_of(third, "retry-after") == "1"
    for client in (first, second):
        serve(plane, client, plane.engine(0))
    assert plane.settlements() == [("one", "ok")] * 2, "what was refused was never sent"


def test_a_wait_has_an_end(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT, admission=Admission(queue_timeout_s=2.0))
    first, second = plane.ask(stream=True), plane.ask()
    plane.wait(1.9)
    assert not second.received
    plane.wait(0.2)
    assert (status_of(second), code_of(second)) == (429, "capacity_exhausted")
    plane.answer(plane.engine(0), ANSWER)
    assert first.received.endswith(b"0\r\n\r\n")


def test_a_client_that_set_a_deadline_is_told_sooner(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT, admission=Admission(queue_timeout_s=20.0), slo=Slo())
    plane.ask(stream=True)
    second = plane.ask(headers=b"x-fleetgate-timeout-ms: 500\r\n")
    plane.wait(0.6)
    assert status_of(second) == 429
    plane.answer(plane.engine(0), ANSWER)


def test_without_a_reachable_engine_the_request_is_refused(plane: Plane) -> None:
    for engine in plane.engines:
        engine.error = ConnectionRefusedError("refused")
    client = plane.ask()
    assert (status_of(client), code_of(client)) == (503, "no_deployment_available")
    assert header_of(client, "x-should-retry") == "true"
    assert plane.settlements() == [("one", "unreachable"), ("two", "unreachable")]


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (FULL, 429, "capacity_exhausted"),
        (whole(b"{}", b"500 Internal Server Error"), 502, "upstream_error"),
        (whole(b"{}", b"401 Unauthorized"), 502, "upstream_auth_error"),
        (whole(b'{"error":{"code":"model_not_found"}}', b"404 Not Found"), 404, "model_not_found"),
        (b"this is not HTTP\r\n\r\n", 502, "upstream_error"),
    ],
)
def test_every_engine_fails_alike(plane: Plane, answer: bytes, status: int, code: str) -> None:
    client = plane.ask()
    for number in (0, 1):
        plane.answer(plane.engine(number), answer)
    assert (status_of(client), code_of(client)) == (status, code)
    assert len(plane.settlements()) == 2


def test_every_engine_is_silent(plane: Plane) -> None:
    plane.take(resilience=Resilience(attempts_max=2))
    client = plane.ask(stream=True)
    plane.wait(59.0)
    assert not plane.engines[1].connections and client.received.count(b": keep-alive") >= 4
    plane.wait(62.0)
    assert plane.engine(0).is_aborted and plane.engine(1).is_aborted
    assert client.received.endswith(b"0\r\n\r\n") or client.is_closed
    assert b"upstream_timeout" in client.received, "an error event, for the head was sent with the first comment"
    assert plane.settlements() == [("one", "timeout"), ("two", "timeout")]


def test_an_unstreamed_request_that_no_engine_answers_gets_504(plane: Plane) -> None:
    plane.take(resilience=Resilience(attempts_max=1))
    client = plane.ask(max_tokens=1)
    plane.wait(600.1)  # without a Profile it may take as long as the official SDKs wait
    assert (status_of(client), code_of(client)) == (504, "upstream_timeout")


# --- moved ---


def test_a_refused_connection_moves_the_request(plane: Plane) -> None:
    plane.engines[0].error = ConnectionRefusedError("refused")
    client = plane.ask()
    serve(plane, client, plane.engine(1))
    assert plane.settlements() == [("one", "unreachable"), ("two", "ok")]


LOSSES = {
    "reset": (None, "broken"),
    "500": (whole(b"{}", b"500 Internal Server Error"), "broken"),
    "503": (whole(b"{}", b"503 Service Unavailable"), "broken"),
    "429": (FULL, "full"),
    "403": (whole(b"{}", b"403 Forbidden"), "credential"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "bad_output"),
}
STREAM_LOSSES = {
    **LOSSES,
    "reset after the head": (STREAM_HEAD + chunked(ROLE), "broken"),
    "an error event": (streamed(b'data: {"error":{"message":"x"}}\n\n'), "broken"),
    "an empty stream": (streamed(), "bad_output"),
    "not a stream": (whole(BODY), "bad_output"),
}


@pytest.mark.parametrize(
    ("stream", "loss"), [(False, loss) for loss in LOSSES] + [(True, loss) for loss in STREAM_LOSSES]
)
def test_a_lost_attempt_moves_the_request(plane: Plane, stream: bool, loss: str) -> None:
    answer, outcome = STREAM_LOSSES[loss]
    client = plane.ask(stream=stream)
    engine = plane.engine(0)
    plane.answer(engine, answer or b"")
    if answer is None or loss == "reset after the head":
        engine.reset()
        plane.run()
    assert not client.received, "the client sees nothing of the first attempt"
    plane.answer(plane.engine(1), ANSWER if stream else whole(BODY))
    assert header_of(client, DEPLOYMENT) == "two" and header_of(client, "x-fleetgate-attempts") == "2"
    assert plane.settlements() == [("one", outcome), ("two", "ok")]


def test_a_stalled_attempt_moves_the_request(plane: Plane) -> None:
    client = plane.ask(stream=True)
    plane.wait(60.1)
    assert plane.engine(0).is_aborted
    plane.answer(plane.engine(1), ANSWER)
    assert b"deployment=two" in client.received and client.received.endswith(b"0\r\n\r\n")
    assert plane.settlements() == [("one", "timeout"), ("two", "ok")]


def test_a_stale_connection_is_no_loss(plane: Plane) -> None:
    serve(plane, plane.ask(), plane.engine(0))
    client = plane.ask()
    kept = plane.engine(0)
    kept.end()
    plane.run()
    assert plane.engines[0].dials == 2 and not plane.engines[1].dials
    serve(plane, client, plane.engines[0].connections[1])
    assert header_of(client, "x-fleetgate-attempts") == "1"
    assert plane.settlements() == [("one", "ok"), ("one", "stale"), ("one", "ok")]


def test_a_slow_dial_is_given_up_when_another_connects_first(plane: Plane) -> None:
    plane.engines[0].is_blackhole = True
    client = plane.ask()
    assert not plane.engines[1].dials
    plane.wait(0.6)
    serve(plane, client, plane.engine(1))
    assert plane.settlements() == [("one", "hedged"), ("two", "ok")]
    assert header_of(client, DEPLOYMENT) == "two" and not plane.engines[0].connections


def test_a_dial_that_was_only_slow_wins_and_no_second_engine_gets_the_request(plane: Plane) -> None:
    plane.engines[0].dial_s = 0.7
    plane.engines[1].dial_s = 0.9
    client = plane.ask()
    plane.wait(1.5)
    serve(plane, client, plane.engine(0))
    assert not any(one.received for one in plane.engines[1].connections)
    assert sorted(plane.settlements()) == [("one", "ok"), ("two", "hedged")]


# --- hedged ---


def hedging(plane: Plane) -> RemoteEnd:
    """A request whose first attempt is slow: a second one was sent."""
    plane.take(resilience=Resilience(hedge="all"), each={"concurrency_max": 10, "concurrency_written": True})
    for _ in range(20):
        client = plane.ask(stream=True)
        plane.answer(plane.engine(0), ANSWER)
        assert client.received.endswith(b"0\r\n\r\n")
    client = plane.ask(stream=True)
    plane.wait(0.2)
    assert plane.in_flight() == 2 and len(plane.engine(1).received) > 0
    return client


def test_the_hedge_wins(plane: Plane) -> None:
    client = hedging(plane)
    plane.answer(plane.engine(1), ANSWER)
    assert header_of(client, DEPLOYMENT) == "two" and plane.engine(0).is_aborted
    assert plane.settlements()[20:] == [("one", "hedged"), ("two", "ok")]


def test_the_hedge_loses(plane: Plane) -> None:
    client = hedging(plane)
    plane.answer(plane.engine(0), ANSWER)
    assert header_of(client, DEPLOYMENT) == "one" and plane.engine(1).is_aborted
    assert sorted(plane.settlements()[20:]) == [("one", "ok"), ("two", "hedged")]


@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_attempts_fails_and_the_other_answers(plane: Plane, lost: int) -> None:
    client = hedging(plane)
    plane.engine(lost).reset()
    plane.run()
    plane.answer(plane.engine(1 - lost), ANSWER)
    assert header_of(client, DEPLOYMENT) == ("two", "one")[lost]


def test_a_client_that_leaves_frees_both_engines(plane: Plane) -> None:
    client = hedging(plane)
    client.reset()
    plane.run()
    assert plane.engine(0).is_aborted and plane.engine(1).is_aborted and not plane.in_flight()


# --- broken off after the first content ---


def test_an_answer_that_broke_off_is_replayed_elsewhere(plane: Plane) -> None:
    client = plane.ask(stream=True, temperature=0, seed=1)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a ")))
    plane.engine(0).reset()
    plane.run()
    plane.answer(plane.engine(1), streamed(ROLE, content("a "), content("b "), content("c"), FINISH, DONE))
    said = Transcript(0)
    for event in bytes(client.received).split(b"data: ")[1:]:
        said.keep(b"data: " + event.partition(b"\n\n")[0] + b"\n\n")
    assert [text for _, text in said.runs] == ["a b c"] and client.received.endswith(b"0\r\n\r\n")
    assert client.received.count(b'"a ') == 1, "what the client has is not sent again"
    assert plane.metric('fleetgate_resumes_total{gateway="chat",way="replay"}') == 1


@pytest.mark.parametrize("fields", [{}, {"temperature": 0, "seed": 1}])
def test_an_answer_that_cannot_be_resumed_ends_with_an_error(plane: Plane, fields: dict[str, Any]) -> None:
    plane.take(resilience=Resilience(resume="off"))
    client = plane.ask(stream=True, **fields)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a")))
    plane.engine(0).reset()
    plane.run()
    assert b"upstream_interrupted" in client.received and client.is_closed
    assert not client.received.endswith(b"0\r\n\r\n") and DONE not in client.received, "it must not look whole"
    assert not plane.engines[1].dials and plane.settlements() == [("one", "broken")]


def test_a_replay_that_says_something_else_is_not_joined(plane: Plane) -> None:
    client = plane.ask(stream=True, temperature=0, seed=1)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a")))
    plane.engine(0).reset()
    plane.run()
    plane.answer(plane.engine(1), streamed(ROLE, content("x"), content("y"), FINISH, DONE))
    assert b"upstream_interrupted" in client.received and b'"y"' not in client.received and client.is_closed


def test_a_stall_after_the_first_content_breaks_the_answer_off(plane: Plane) -> None:
    plane.take(count=1)
    client = plane.ask(stream=True)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a")))
    plane.wait(17.0)
    assert b"upstream_interrupted" in client.received and plane.engine(0).is_aborted
    assert plane.settlements() == [("one", "timeout")]


# --- ended from outside ---


def test_a_client_that_leaves_while_it_waits_gives_its_place_up(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT)
    first, second, third = plane.ask(), plane.ask(), plane.ask()
    second.reset()
    plane.run()
    serve(plane, first, plane.engine(0))
    serve(plane, third, plane.engine(0))
    assert plane.settlements() == [("one", "ok")] * 2


@pytest.mark.parametrize("dial_s", [0.0, 10.0])
def test_a_client_that_leaves_before_content_frees_the_slot(plane: Plane, dial_s: float) -> None:
    plane.engines[0].dial_s = dial_s
    client = plane.ask(stream=True)
    assert plane.in_flight() == 1
    client.reset()
    plane.run()
    assert not plane.in_flight() and plane.settlements() == [("one", "client_gone")]
    plane.wait(dial_s)
    assert all(one.is_aborted and not one.received for one in plane.engines[0].connections if dial_s)


def test_a_client_that_leaves_is_billed_for_what_it_read(plane: Plane) -> None:
    client = plane.ask(stream=True)
    plane.answer(plane.engine(0), STREAM_HEAD + chunked(ROLE, content("a"), content("b")))
    client.reset()
    plane.run()
    assert plane.engine(0).is_aborted and plane.settlements() == [("one", "client_gone")]
    assert plane.usage()[-1]["billed_output_tokens"] == 2


def test_keep_alive_comments_come_before_the_first_content(plane: Plane) -> None:
    client = plane.ask(stream=True)
    plane.wait(9.0)
    assert not client.received
    plane.wait(13.0)
    assert client.received.count(b": keep-alive\n\n") == 2 and header_of(client, DEPLOYMENT) == "one"
    plane.answer(plane.engine(0), ANSWER)
    assert client.received.endswith(b"0\r\n\r\n") and b"deployment=" not in client.received


def test_no_comment_and_no_head_is_sent_while_the_request_waits(plane: Plane) -> None:
    plane.take(count=1, each=LIMIT, admission=Admission(queue_timeout_s=30.0))
    first, second = plane.ask(), plane.ask(stream=True)
    plane.wait(25.0)
    assert not second.received, "a status would be worth more"
    serve(plane, first, plane.engine(0))
    plane.answer(plane.engine(0), ANSWER)
    assert second.received.endswith(b"0\r\n\r\n")
