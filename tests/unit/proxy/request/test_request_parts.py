"""The parts of a request: its context, its place, its deadlines, its resume, its records and its bytes."""

from typing import Any, cast

import msgspec
import pytest

from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import Failure, Outcome, Refuse
from fleetgate.core.model import Profile, Slo
from fleetgate.ipc.shared_memory import DeploymentCounter, WorkerCell
from fleetgate.protocols.http1 import parse_request_head
from fleetgate.protocols.messages import ResumeMethod, Usage
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.downstream.authenticator import ANONYMOUS
from fleetgate.proxy.request.attempt import (
    ONE_WRITE_BYTES_MAX,
    Attempt,
    CarriedRequest,
    expected_response,
    request_bytes,
)
from fleetgate.proxy.request.attempts import AttemptSet
from fleetgate.proxy.request.deadlines import (
    COMMENT_EVERY_S,
    ProgressMonitor,
    first_event_s,
    progress_of,
    whole_answer_s,
)
from fleetgate.proxy.request.outcome import final_response
from fleetgate.proxy.request.placement import RETRY_AFTER_IN_PLACE_MAX_S, Placer
from fleetgate.proxy.request.registry import RequestRegistry
from fleetgate.proxy.request.request_context import ReceivedRequest, RequestContext
from fleetgate.proxy.request.reservation import PlacementRequest, Reservation
from fleetgate.proxy.request.response import heads
from fleetgate.proxy.request.response.client_stream import ClientStream
from fleetgate.proxy.request.response.heads import ResponseDefaults, ResponseMeta
from fleetgate.proxy.request.response.in_flight import InFlightRequest
from fleetgate.proxy.request.response.writer import ResponseWriter
from fleetgate.proxy.request.resume import Resume, transcript_for
from fleetgate.proxy.request.services import HandlerServices
from fleetgate.proxy.request.usage import UsageRecorder
from fleetgate.proxy.routing.model_route import KEY_BUDGETS_MAX
from tests.conformance.transport_rig import content
from tests.unit.proxy.request.handler_rig import Bench, FakeClient

PATH = "/v1/chat/completions"
LIMIT = {"concurrency_max": 1, "concurrency_written": True}
PROFILE = Profile(name="p", prefill_tokens_per_s=1000.0, base_s=0.01, per_sequence_s=0.001)


def received(bench: Bench, headers: bytes = b"", **fields: object) -> ReceivedRequest:
    """A request that is not begun."""
    body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields})
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.test\r\n%bcontent-length: 2\r\n\r\n" % headers
    table = bench.active.current
    context = RequestContext(parse_request_head(head), table, table.gateways[b"chat.test"], ANONYMOUS, b"")
    operation = context.operation
    assert operation is not None
    return ReceivedRequest(context, operation, context.gateway.routes["m"], context.protocol.parse_request(body), body)


# --- what a head says ---


@pytest.mark.parametrize(
    ("value", "timeout_s"),
    [(b"1500", 1.5), (b"", 0.0), (b"-5", 0.0), (b"0", 0.0), (b"1e3", 0.0), (b"3600000", 3600.0), (b"3600001", 0.0)],
)
def test_a_deadline_that_means_nothing_makes_no_request_urgent(value: bytes, timeout_s: float) -> None:
    assert received(Bench(), b"x-fleetgate-timeout-ms: %b\r\n" % value).context.timeout_s == timeout_s


def test_a_client_that_retries_by_itself_is_known() -> None:
    counts = {value: received(Bench(), b"x-stainless-retry-count: %b\r\n" % value).context.client_retries
              for value in (b"0", b"2", b"x", b"99999")}  # fmt: skip
    assert counts == {b"0": 0, b"2": 2, b"x": 0, b"99999": 0}


def test_each_key_has_a_budget_and_there_are_not_more_than_fit() -> None:
    gateway = Bench().active.current.gateways[b"chat.test"]
    first = gateway.budget_of("k")
    assert gateway.budget_of("k") is first and gateway.budget_of("l") is not first
    for number in range(KEY_BUDGETS_MAX):
        gateway.budget_of(str(number))
    assert len(gateway._key_budgets) <= KEY_BUDGETS_MAX


# --- what is sent ---


def test_the_model_has_the_engines_name_and_usage_is_asked_for() -> None:
    bench = Bench(1, each={"models": {"m": "llama"}, "engine": "vllm"})
    request, deployment = received(bench, stream=True), bench.active.current.deployments[0]
    expected = expected_response(request, request.route, deployment, None)
    assert expected.hide_usage and expected.names.rename == (b'"llama"', b'"m"') and not expected.wants_whole
    carried = CarriedRequest(b"id", 1, request, None, cast(Any, None))
    (data,) = request_bytes(carried, deployment, deployment.endpoints[0], expected.hide_usage)
    head, _, body = data.partition(b"\r\n\r\n")
    asked = msgspec.json.decode(body)
    assert asked["model"] == "llama" and asked["stream_options"] == {"include_usage": True}
    assert b"x-request-id: id\r\n" in head + b"\r\n" and b"content-length: %d" % len(body) in head


def test_a_large_body_is_not_copied_behind_its_head() -> None:
    bench = Bench(1)
    request, deployment = received(bench, user="x" * ONE_WRITE_BYTES_MAX), bench.active.current.deployments[0]
    carried = CarriedRequest(b"id", 1, request, None, cast(Any, None))
    _, body = request_bytes(carried, deployment, deployment.endpoints[0], False)
    assert body is request.body


def test_a_slot_is_given_back_once() -> None:
    bench = Bench(1, each=LIMIT)
    request = received(bench)
    lead = bench.services.placer.take_lead(request.route)
    assert lead is not None and bench.services.placer.take_lead(request.route) is None, "it is full"
    attempt = Attempt(bench.services.attempts, request.route, lead, None)
    attempt.settle(1.0)
    attempt.settle(1.0)
    assert bench.shared.in_flight_total(0) == 0 and bench.services.placer.take_lead(request.route) is lead


# --- where it is placed ---


def test_a_lead_that_is_not_well_is_left_to_the_scheduler() -> None:
    bench = Bench(2)
    placer, route, lead = bench.services.placer, received(bench).route, bench.active.current.deployments[0]
    assert isinstance(placer, Placer) and isinstance(bench.services, HandlerServices)
    for field, value in (("health", 0.5), ("external_in_flight", 1), ("paused", True)):
        usual = getattr(lead, field)
        setattr(lead, field, value)
        assert placer.take_lead(route) is None
        setattr(lead, field, usual)
    assert placer.take_lead(route) is lead


def test_a_route_whose_engines_all_want_to_be_left_alone_refuses_at_once() -> None:
    bench = Bench(1)
    deployment = bench.active.current.deployments[0]
    bench._health.apply_retry_after(deployment, RETRY_AFTER_IN_PLACE_MAX_S + 5.0)
    client = bench.request()
    assert b"429 " in client.written[:20] and b"retry-after: 7\r\n" in client.written and not bench.sent_to()


def test_the_registry_counts_and_wakes_those_that_wait() -> None:
    bench = Bench(1, each=LIMIT)
    registry = bench.registry
    assert isinstance(registry, RequestRegistry)
    clients = [bench.request() for _ in range(3)]
    assert registry.total_waiting(0) == 2 == bench.shared.get(0, WorkerCell.WAITING)
    endpoint = bench.active.current.deployments[0].endpoints[0]
    assert registry.others_at(endpoint, clients[0].handler) == (0, 0)
    assert registry.others_at(endpoint, clients[1].handler) == (1, 1)
    for client in clients:
        client.handler.client_gone()
    assert registry.total_waiting(0) == 0 == bench.shared.get(0, WorkerCell.WAITING)


def test_a_silent_request_moves_from_an_endpoint_that_cannot_be_reached() -> None:
    bench = Bench(2)
    client = bench.request()
    endpoint = bench.active.current.deployments[0].endpoints[0]
    bench.now_s += 1.0
    bench.registry.move_silent_soon(endpoint)
    bench.run()
    assert bench.sent_to() == ["one"], "it was sent a moment ago"
    bench.now_s += 1.5
    bench.registry.move_silent_soon(endpoint)
    bench.run()
    assert bench.sent_to() == ["one", "two"]
    client.handler.client_gone()


def test_a_reservation_counts_what_is_late_only_with_a_promise() -> None:
    for slo, late in ((None, 0), (Slo(ttft_s=0.1), 1)):
        bench = Bench(1, each={"profile": PROFILE, "engine": "vllm"}, slo=slo)
        bench.request()
        (sent,) = bench.transport.sent
        reservation = bench.handlers[0].attempts.current
        assert reservation is not None and isinstance(reservation.reservation, Reservation)
        bench.now_s += 5.0
        sent.content()
        assert bench.shared.deployment_counters[DeploymentCounter.TTFT_LATE] == late
        sent.end()
        assert bench.shared.deployment_counters[DeploymentCounter.ENDED] == 1 and bench.is_idle()


def test_what_a_request_needs_is_worked_out_once() -> None:
    bench = Bench(2)
    request = received(bench, max_tokens=7)
    wanted = PlacementRequest(request, request.route, TokenEstimates())
    assert wanted.shape.prompt_tokens > 0 and wanted.shape.output_tokens <= 7
    assert wanted.schedule_request(2.5).waited_s == 2.5


# --- how long it may take ---


def test_the_first_event_may_take_longer_where_it_was_seen_to() -> None:
    deployment = Bench().active.current.deployments[0]
    assert first_event_s(True, 100, deployment, None) == 60.0 and first_event_s(True, 100, deployment, 4.0) == 12.0
    assert first_event_s(False, 100, deployment, 4.0) == 30.0
    assert whole_answer_s(deployment, 1.0, 100) == 600.0, "its time per token is not known"


def test_a_monitor_tells_progress_from_silence() -> None:
    bench = Bench()
    bench.request()
    (sent,) = bench.transport.sent
    monitor = ProgressMonitor()
    assert not monitor.has_moved(cast(Any, sent))
    sent.beats += 1
    assert monitor.has_moved(cast(Any, sent)) and not monitor.has_moved(cast(Any, sent))
    assert progress_of(cast(Any, sent)) == 1
    assert monitor.is_comment_due(0.0, COMMENT_EVERY_S) and not monitor.is_comment_due(0.0, COMMENT_EVERY_S - 0.1)
    monitor.note_comment(COMMENT_EVERY_S)
    assert not monitor.is_comment_due(0.0, COMMENT_EVERY_S + 1.0)


# --- resume ---


@pytest.mark.parametrize(("fields", "keeps"), [({"temperature": 0, "seed": 1}, True), ({}, False)])
def test_a_stream_is_kept_only_if_it_could_be_resumed(fields: dict[str, Any], keeps: bool) -> None:
    bench = Bench(2)
    request = received(bench, stream=True, **fields)
    assert (transcript_for(request, request.route, bench.active.current.deployments[0]) is not None) is keeps
    alone = Bench(1)
    request = received(alone, stream=True, **fields)
    assert transcript_for(request, request.route, alone.active.current.deployments[0]) is None


def test_a_prefix_is_continued_only_where_that_was_seen() -> None:
    bench = Bench(2, each={"engine": "vllm"})
    first, second = bench.active.current.deployments.values()
    second.set_resume_support(prefill=True, token_mark=0)
    request = received(bench, stream=True)
    transcript = Transcript(0)
    transcript.keep(content("a"))
    bench.request()
    response = bench.transport.sent[0]
    response.transcript, response.event_count = transcript, 1
    resume = Resume.of(request, cast(Any, response), request.route, (), 1.0)
    assert resume is not None and resume.method is ResumeMethod.PREFILL
    assert list(resume.unfit_slots(request.route)) == [first.slot] and resume.is_possible(request.body)
    assert b'"assistant"' in resume.body(request.body, "vllm")
    assert Resume.of(request, cast(Any, bench.transport.sent[0]), request.route, (), 1.0) is not None
    response.transcript = None
    assert Resume.of(request, cast(Any, response), request.route, (), 1.0) is None


# --- records ---


def test_what_a_client_has_read_of_a_lost_attempt_is_charged_when_its_end_is_known() -> None:
    rows: list[bytes] = []
    usage = UsageRecorder(rows.append, (b'"k"', b'"gateway":"g","model":"m"'), TokenEstimates(), "m", 400)
    bench = Bench(1)
    bench.request()
    (sent,) = bench.transport.sent
    sent.stream, sent.event_count = True, 3
    usage.begin(bench.active.current.deployments[0], b"a-1")
    usage.lost(b"a-1", cast(Any, sent), b"broken", True)
    assert not any(b'"t":"s"' in row for row in rows), "another Deployment may resume the answer"
    usage.end(b"", cast(Any, sent), Outcome.INTERRUPTED, 10)
    (settled,) = [row for row in map(msgspec.json.decode, rows) if row["t"] == "s"]
    assert settled["outcome"] == "broken" and settled["billed_output_tokens"] == 3


def test_an_answer_is_kept_only_if_it_is_whole() -> None:
    bench = Bench(1)
    bench.request(stream=False)
    attempt = bench.handlers[0].attempts.current
    assert final_response(attempt, Outcome.FAILED, 5).ok is False and final_response(None, Outcome.OK, 5).ok is False
    assert attempt is not None and isinstance(bench.handlers[0].attempts, AttemptSet)
    bench.transport.sent[0].held = [b"body"]
    kept = final_response(attempt, Outcome.OK, 5)
    assert kept.ok and kept.body == b"body" and b"x-fleetgate-deployment: one\r\n" in kept.headers


def test_tokens_and_failures_are_counted() -> None:
    bench = Bench(2)
    bench.request(stream=False)
    bench.transport.sent[0].fail(Failure.FULL)
    bench.transport.sent[1].usage = Usage(prompt_tokens=3, completion_tokens=2)
    bench.transport.sent[1].content()
    totals = bench.shared.series_totals()
    named = {name: value for name, value in totals.items() if 'deployment="two"' in name and value}
    assert any("tokens_total" in name and 'kind="output"' in name and value == 2 for name, value in named.items())
    assert any("attempt_failures" in name and 'failure="full"' in name for name, value in totals.items() if value)
    assert bench.shared.deployment_counters[DeploymentCounter.REFUSED] == 1


# --- bytes ---


def test_a_refusal_says_when_to_come_back_and_not_all_at_once() -> None:
    def wait_ms(request_id: bytes, refuse: Refuse) -> int:
        data = heads.refusal(ResponseMeta(b"", request_id, 1, b""), refuse, b"application/json", b"{}")
        return int(data.partition(b"retry-after-ms: ")[2].partition(b"\r\n")[0])

    waits = {wait_ms(b"r%d" % number, Refuse(503, "x", 5.0)) for number in range(50)}
    assert len(waits) > 10 and min(waits) >= 4000 and max(waits) <= 6000
    assert {wait_ms(b"r%d" % number, Refuse(429, "x", 5.0)) for number in range(50)} == {5000}


def test_every_answer_of_a_worker_that_leaves_closes_its_connection() -> None:
    bench = Bench(1)
    bench.services.defaults.begin_drain()
    client = bench.request(stream=False)
    bench.transport.sent[0].content()
    assert b"connection: close\r\n" in client.written and not client.keep_alive
    assert isinstance(bench.services.defaults, ResponseDefaults)


def test_a_write_that_fails_ends_this_request_alone() -> None:
    errors: list[BaseException] = []
    defaults = ResponseDefaults(lambda error, request_id: errors.append(error))
    defaults.set_date(0)
    assert defaults.date_line == b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
    fake = FakeClient()
    client: ClientStream = fake
    failed: list[bytes] = []

    def broken(data: bytes) -> None:
        raise RuntimeError("a bug")

    client.write = broken
    fake.fail = failed.append  # type: ignore[method-assign,assignment]
    writer = ResponseWriter(client, b"r1", received(Bench()).context, defaults)
    writer.write(b"")
    assert not errors
    writer.write(b"x")
    assert failed == [b"r1"] and len(errors) == 1


def test_a_handler_is_what_its_connection_expects() -> None:
    bench = Bench(1)
    client = bench.request()
    handler: InFlightRequest = client.handler
    assert not handler.is_streaming
    bench.transport.sent[0].content()
    assert handler.is_streaming
    handler.client_gone()
    assert not bench.errors and bench.is_idle()
