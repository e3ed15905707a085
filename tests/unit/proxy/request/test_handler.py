"""A request handler by its commands: what it sends, cancels, writes and records for each event that it is told."""

import gc
from weakref import ref

import pytest

from fleetgate.core.exchange import Failure
from fleetgate.core.health.circuit_breaker import CONSECUTIVE_FAILURES_MAX, BreakerState
from fleetgate.core.model import Admission, Resilience
from fleetgate.proxy.request.handler import REVOKED
from tests.unit.proxy.request.handler_rig import Bench

LIMIT = {"concurrency_max": 1, "concurrency_written": True}


def test_a_stream_is_written_as_it_comes_and_its_end_after_its_slot_is_free() -> None:
    bench = Bench()
    client = bench.request()
    (sent,) = bench.transport.sent
    assert b'"stream":true' in sent.request and not client.written
    sent.content("a")
    head, _, body = client.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK") and b"x-fleetgate-deployment: one" in head and body == b"a"
    sent.event("b")
    assert client.written.endswith(b"ab") and not client.ends
    written = client.write

    def check(data: bytes) -> None:
        assert bench.shared.in_flight_total(0) == 0, "a client that sends its next request must find the slot free"
        written(data)

    client.handler.writer.client.write = check
    sent.end()
    assert client.written.endswith(b"ab.") and client.ends == ["ended"] and bench.is_idle()
    assert bench.settlements() == [("one", "ok")] and sent.commands == []


def test_a_whole_answer_is_one_write() -> None:
    bench = Bench()
    client = bench.request(stream=False)
    bench.transport.sent[0].content("whole")
    assert b"content-length: 5\r\n" in client.written and client.written.endswith(b"\r\n\r\nwhole")
    assert client.ends == ["ended"] and bench.is_idle()


@pytest.mark.parametrize("failure", list(Failure))
def test_what_fails_before_content_goes_to_the_next_deployment(failure: Failure) -> None:
    bench = Bench()
    client = bench.request()
    bench.transport.sent[0].fail(failure)
    if failure is Failure.POISON:
        assert b'"poison_request"' in client.written and bench.is_idle()
        return
    assert bench.sent_to() == ["one", "two"] and not client.written
    bench.transport.sent[1].content()
    bench.transport.sent[1].end()
    assert bench.settlements() == [("one", failure), ("two", "ok")] and bench.is_idle()


def test_no_more_attempts_than_are_allowed() -> None:
    bench = Bench(3, resilience=Resilience(attempts_max=2))
    client = bench.request()
    for _ in range(2):
        bench.transport.sent[-1].fail()
    assert bench.sent_to() == ["one", "two"] and b'"upstream_error"' in client.written and bench.is_idle()


def test_attempts_that_were_not_sent_are_not_counted() -> None:
    bench = Bench(3, resilience=Resilience(attempts_max=1))
    bench.transport.keeps = False
    client = bench.request()
    for _ in range(2):
        bench.transport.sent[-1].not_connected()
    assert bench.sent_to() == ["one", "two", "three"]
    bench.transport.sent[-1].connect()
    bench.transport.sent[-1].content()
    bench.transport.sent[-1].end()
    assert client.ends == ["ended"] and b"x-fleetgate-attempts: 3" in client.written and bench.is_idle()


def test_a_stale_connection_is_sent_once_more_on_a_new_one() -> None:
    bench = Bench()
    client = bench.request()
    bench.transport.sent[0].stale()
    assert bench.sent_to() == ["one", "one"] and not bench.transport.sent[1].is_connected
    bench.transport.sent[1].connect()
    bench.transport.sent[1].content()
    bench.transport.sent[1].end()
    assert bench.settlements() == [("one", "stale"), ("one", "ok")] and bench.is_idle()
    assert b"x-fleetgate-attempts: 1" in client.written


def test_a_slow_dial_begins_a_second_one_and_the_first_connected_is_sent() -> None:
    for winner in (0, 1):
        bench = Bench()
        bench.transport.keeps = False
        bench.request()
        bench.transport.sent[0].dial_slow()
        assert bench.sent_to() == ["one", "two"]
        bench.transport.sent[winner].connect()
        assert bench.transport.sent[1 - winner].commands == ["cancel"] and not bench.transport.sent[winner].commands
        bench.transport.sent[1 - winner].not_connected()
        bench.transport.sent[winner].content()
        bench.transport.sent[winner].end()
        name = ("one", "two")[winner]
        assert (name, "ok") in bench.settlements() and bench.is_idle()


def test_a_late_report_of_a_dial_that_was_given_up_counts_against_its_endpoint() -> None:
    bench = Bench()
    bench.transport.keeps = False
    for _ in range(CONSECUTIVE_FAILURES_MAX):
        client = bench.request()
        client.handler.client_gone()
        assert bench.is_idle() and client.ends == ["ended"]
    endpoint = bench.active.current.deployments[0].endpoints[0]
    for sent in bench.transport.sent:
        assert endpoint.health.breaker is BreakerState.CLOSED
        sent.not_connected()
    assert endpoint.health.breaker is BreakerState.DOWN and bench.is_idle()
    assert [event.name for event in bench.spool.events] == ["one"]


def test_a_full_worker_queues_and_serves_when_a_slot_is_free() -> None:
    bench = Bench(1, each=LIMIT)
    first, second = bench.request(), bench.request()
    assert bench.sent_to() == ["one"] and bench.registry.has_waiting
    bench.transport.sent[0].content()
    bench.transport.sent[0].end()
    bench.run()
    assert bench.sent_to() == ["one", "one"] and not bench.registry.has_waiting
    bench.transport.sent[1].content()
    bench.transport.sent[1].end()
    assert first.ends == second.ends == ["ended"] and bench.is_idle()


def test_a_queue_that_is_full_or_too_slow_refuses() -> None:
    bench = Bench(1, each=LIMIT, admission=Admission(queue_max=1, queue_timeout_s=1.0))
    first, second, third = (bench.request() for _ in range(3))
    assert b'"queue_full"' in third.written and not second.written
    bench.wait(1.1)
    assert b'"capacity_exhausted"' in second.written and not first.written
    first.handler.client_gone()
    assert bench.is_idle()


def test_silence_before_the_first_event_ends_an_attempt() -> None:
    bench = Bench()
    bench.request()
    bench.wait(59.9)
    assert bench.sent_to() == ["one"]
    bench.wait(0.2)
    assert bench.transport.sent[0].commands == ["cancel"] and bench.sent_to() == ["one", "two"]
    bench.transport.sent[1].content()
    bench.transport.sent[1].end()
    assert bench.settlements() == [("one", "timeout"), ("two", "ok")] and bench.is_idle()


def test_a_stream_that_lacks_only_its_tail_is_not_a_stall() -> None:
    bench = Bench()
    client = bench.request()
    bench.transport.sent[0].content()
    bench.transport.sent[0].only_the_tail_is_missing = True
    bench.wait(20.0)
    assert client.ends == ["ended"] and bench.settlements() == [("one", "ok")] and bench.is_idle()


def test_a_client_that_does_not_read_stops_the_upstream_and_its_deadline() -> None:
    bench = Bench()
    client = bench.request()
    (sent,) = bench.transport.sent
    sent.content()
    client.is_behind = True
    client.handler.pause()
    bench.wait(40.0)
    assert sent.commands == ["pause"], "silence is the client's here"
    client.is_behind = False
    client.handler.resume()
    sent.end()
    assert sent.commands == ["pause", "resume"] and client.ends == ["ended"] and bench.is_idle()


def test_a_broken_stream_is_resumed_where_a_replay_is_the_same() -> None:
    bench = Bench()
    client = bench.request(temperature=0, seed=1)
    (first,) = bench.transport.sent
    first.content("a")
    assert first.transcript is not None
    first.fail()
    second = bench.transport.sent[1]
    assert second.expected.resumed is not None and second.expected.resumed.event_count == 1
    second.content("b")
    second.end()
    assert b": fleetgate deployment=two" in client.written and client.written.endswith(b".")
    assert bench.settlements() == [("one", "broken"), ("two", "ok")] and bench.is_idle()


def test_a_broken_stream_that_cannot_be_resumed_ends_with_an_error() -> None:
    bench = Bench()
    client = bench.request()  # not deterministic, and no engine is known to continue a prefix
    bench.transport.sent[0].content("a")
    bench.transport.sent[0].fail()
    assert b"upstream_interrupted" in client.written and not client.keep_alive and client.ends == ["ended"]
    assert bench.sent_to() == ["one"] and bench.is_idle()


@pytest.mark.parametrize("phase", ["queued", "dialling", "sent", "streaming"])
@pytest.mark.parametrize("how", ["gone", "revoked"])
def test_it_can_be_ended_in_every_phase(phase: str, how: str) -> None:
    bench = Bench(1, each=LIMIT)
    bench.transport.keeps = phase != "dialling"
    other = bench.request() if phase == "queued" else None
    client = bench.request()
    sent = bench.transport.sent[-1]
    if phase == "streaming":
        sent.content()
    if how == "gone":
        client.handler.client_gone()
    else:
        client.handler.terminate(REVOKED)
        assert b"invalid_api_key" in client.written and not client.keep_alive
    assert client.ends == ["ended"]
    client.handler.client_gone()
    client.handler.terminate(REVOKED)
    assert client.ends == ["ended"], "only once"
    assert sent.commands == ([] if other is not None else ["cancel"])
    if other is not None:
        other.handler.client_gone()
    outcome = "client_gone" if how == "gone" or phase == "streaming" else "refused"
    assert bench.settlements()[-1] == ("one", "client_gone" if other else outcome) and bench.is_idle()


@pytest.mark.parametrize("end", ["stream", "whole", "refused", "gone", "interrupted"])
def test_an_ended_request_is_freed_without_the_collector(end: str) -> None:
    """A response of 8 MiB would else stay in memory until the collector comes by."""
    bench = Bench(1)
    client = bench.request(stream=end != "whole")
    handler, sent = ref(client.handler), bench.transport.sent.pop()
    if end in ("stream", "whole", "interrupted"):
        sent.content()
    if end == "gone":
        client.handler.client_gone()
    elif end == "stream":
        sent.end()
    elif end != "whole":
        sent.fail()
    assert client.ends == ["ended"] and bench.is_idle()
    bench.handlers.clear()
    gc.disable()
    try:
        del client.handler, sent
        assert handler() is None
    finally:
        gc.enable()
