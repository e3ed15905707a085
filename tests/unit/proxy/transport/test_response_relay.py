"""How a response is read, event by event, without a network."""

import sys
from collections.abc import Callable, Iterator
from types import FrameType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.exchange import Failure
from fleetgate.core.model import Endpoint
from fleetgate.protocols import clients
from fleetgate.protocols.clients.openai import OPERATIONS
from fleetgate.protocols.messages import ResumeMethod
from fleetgate.protocols.resume.splice import StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.transport.connection_pool import ConnectionPool, UpstreamConnection
from fleetgate.proxy.transport.interface import ExpectedResponse, ModelNames, ResumedStream
from fleetgate.proxy.transport.memory_network import MemoryNetwork, RemoteEnd, SimulatedLoop
from fleetgate.proxy.transport.response_relay import HELD_EVENTS_BYTES_MAX, ResponseRelay
from fleetgate.proxy.transport.resume_relay import ResumeRelay
from tests.conformance.transport_rig import (
    BODY,
    DONE,
    EVENTS,
    FINISH,
    NAMES,
    ROLE,
    STREAM,
    STREAM_HEAD,
    WHOLE,
    Recorder,
    chunked,
    content,
    streamed,
    whole,
)

ENDPOINT = Endpoint(slot=0, scheme="http", host="127.0.0.1", port=80, base_path="/v1")
ERROR = b'data: {"error":{"message":"no","type":"server_error","code":500}}\n\n'
USAGE = b'data: {"id":"1","model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
LOOP = SimulatedLoop()
OPENAI = clients.find("openai")
FRAMES_MAX = 5  # Python calls for an event of a stream, the listener's `write` included


class ClockedRecorder(Recorder):
    """A recorder without a running loop."""

    def now_s(self) -> float:
        return 0.0


class Response:
    """A response that a connection in memory carries."""

    def __init__(self, expected: ExpectedResponse = STREAM) -> None:
        self.pool = ConnectionPool(ENDPOINT, None, None)
        self.pool.addresses.current = [""]
        self.connection = UpstreamConnection(self.pool)
        self.engine: RemoteEnd = MemoryNetwork(LOOP).client(lambda: self.connection)
        self.got, self.relay = self.carry(expected)

    def carry(self, expected: ExpectedResponse) -> tuple[ClockedRecorder, ResponseRelay]:
        """Send another request on the same connection."""
        self.got = recorder = ClockedRecorder()
        relay = (ResponseRelay if expected.resumed is None else ResumeRelay)(recorder, expected)
        relay.connection, relay.is_connected = self.connection, True
        recorder.response = self.relay = relay
        self.connection.carry(relay, (b"request",))
        return recorder, relay

    def read(self, data: bytes) -> "Response":
        """Data comes in one read."""
        self.connection.data_received(data)
        return self


@pytest.fixture(scope="module", autouse=True)
def loop() -> Iterator[None]:
    yield
    LOOP.close()


@pytest.fixture
def response() -> Response:
    return Response()


class TestHead:
    """What the head of a response decides."""

    def test_an_interim_head_is_not_passed_on(self, response: Response) -> None:
        response.read(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 2 + streamed(*EVENTS))
        assert response.got.reports == ["first", "ended"] and response.relay.status == 200

    @pytest.mark.parametrize(
        ("status", "headers", "failure", "wait_s"),
        [
            (b"429 Too Many Requests", b"retry-after: 7\r\n", Failure.FULL, 7.0),
            (b"503 Service Unavailable", b"", Failure.BROKEN, 0.0),
            (b"401 Unauthorized", b"", Failure.CREDENTIAL, 0.0),
            (b"500 Internal Server Error", b"", Failure.BROKEN, 0.0),
        ],
    )
    def test_a_status_is_a_failure(
        self, response: Response, status: bytes, headers: bytes, failure: Failure, wait_s: float
    ) -> None:
        events = []
        response.got.on_failed = lambda response, event: events.append(event)  # type: ignore[method-assign]
        response.read(b"HTTP/1.1 %b\r\n%bcontent-length: 0\r\n\r\n" % (status, headers))
        assert [(event.failure, event.wait_s, event.sent) for event in events] == [(failure, wait_s, True)]
        assert response.connection.transport.is_closing()

    def test_a_head_without_end_is_refused(self, response: Response) -> None:
        response.read(b"HTTP/1.1 200 OK\r\n")
        for _ in range(40):
            if not response.got.is_over:
                response.read(b"x-filler: %b\r\n" % (b"x" * 2000))
        assert response.got.failure is Failure.BAD_OUTPUT

    def test_only_some_headers_are_for_the_client(self) -> None:
        response = Response(WHOLE)
        data = whole(BODY).replace(b"content-length", b"set-cookie: a=b\r\nopenai-model: q\r\ncontent-length")
        response.read(data)
        assert response.relay.passed == b"content-type: application/json\r\nopenai-model: q\r\n"

    def test_a_head_like_the_last_one_is_not_parsed_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dated = whole(BODY).replace(b"content-type", b"date: Sat, 28 Nov 2026 18:00:0%d GMT\r\ncontent-type", 1)
        response = Response(WHOLE)
        response.read(dated % 1 if b"%d" in dated else dated)
        monkeypatch.setattr("fleetgate.protocols.http1.parse_response_head", None)
        for second in (1, 2):
            got, relay = response.carry(WHOLE)
            response.read(dated.replace(b"0%d GMT", b"0%d GMT" % second))
            assert got.reports == ["first", "ended"] and got.held == BODY
            assert relay.passed == b"content-type: application/json\r\n"


class TestWhole:
    """A body that is held until it is known to be whole."""

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (BODY.replace(b'"hi"', b'"\xff"'), WHOLE),
            (BODY[:-1], WHOLE),
            (BODY, STREAM),
            (b'{"error":{"message":"no","code":500}}', WHOLE),
        ],
        ids=["not UTF-8", "not whole", "no stream", "an error behind 200"],
    )
    def test_what_is_no_answer_fails(self, body: bytes, expected: ExpectedResponse) -> None:
        response = Response(expected).read(whole(body))
        assert response.got.reports == ["failed"]

    def test_a_client_error_is_passed_on(self) -> None:
        response = Response(STREAM).read(whole(b'{"error":{}}', b"422 Unprocessable Entity"))
        assert response.got.reports == ["first", "ended"] and response.relay.status == 422
        assert response.got.held == b'{"error":{}}' and not response.relay.stream

    def test_an_error_of_the_request_behind_200_is_passed_on_with_its_status(self) -> None:
        response = Response(WHOLE).read(whole(b'{"error":{"message":"too long","code":400}}'))
        assert response.got.reports == ["first", "ended"] and response.relay.status == 400

    def test_a_body_ends_with_its_connection(self) -> None:
        response = Response(WHOLE).read(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + BODY)
        assert not response.got.reports and response.relay.body_bytes == len(BODY)
        response.connection.connection_lost(None)
        assert response.got.reports == ["first", "ended"] and response.got.held == BODY
        broken = Response(WHOLE).read(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
        broken.connection.connection_lost(ConnectionResetError())
        assert broken.got.failure is Failure.BROKEN

    def test_the_client_gets_the_name_that_it_asked_for(self) -> None:
        for names in (ModelNames(b'"engine-name"', b'"m"'), NAMES):
            expected = msgspec.structs.replace(WHOLE, names=names)
            for engine in (b'"engine-name"', b'"third-name"'):
                response = Response(expected).read(whole(BODY.replace(b'"m"', engine)))
                assert response.got.held == BODY


class TestStream:
    """Events before and after the first content."""

    @given(cuts=st.lists(st.integers(1, len(streamed(*EVENTS, USAGE)) - 1), max_size=8))
    def test_wherever_it_is_cut(self, cuts: list[int]) -> None:
        data = streamed(*EVENTS[:-1], USAGE, DONE)
        response = Response()
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
            if begin < end:
                response.read(data[begin:end])
        assert response.got.payload() == b"".join([*EVENTS[:-1], USAGE, DONE])
        assert response.relay.usage is not None and response.relay.usage.output == 2
        assert response.pool.take_idle() is response.connection

    def test_the_usage_that_the_gateway_asked_for_is_hidden(self) -> None:
        response = Response(msgspec.structs.replace(STREAM, hide_usage=True))
        response.read(streamed(*EVENTS[:-1], USAGE, DONE))
        assert response.got.payload() == b"".join(EVENTS) and response.relay.usage is not None

    def test_http_1_0_gets_no_framing(self) -> None:
        response = Response(msgspec.structs.replace(STREAM, raw=True)).read(streamed(*EVENTS))
        assert response.got.written + response.got.tail == b"".join(EVENTS) and response.relay.raw

    def test_every_choice_has_to_end(self) -> None:
        other = FINISH.replace(b'"index":0', b'"index":1')
        begun = content("x").replace(b'"index":0', b'"index":1')
        several = msgspec.structs.replace(STREAM, several_choices=True)
        response = Response(several).read(STREAM_HEAD + chunked(content("a"), begun, FINISH))
        assert not response.relay.finish_seen and not response.relay.finish()
        response.read(chunked(other, DONE) + b"0\r\n\r\n")
        assert response.got.reports == ["first", "ended"]
        half = Response(several).read(streamed(content("a"), begun, FINISH, DONE))
        assert half.got.reports == ["first", "failed"]

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("end", [ERROR, DONE, b"0\r\n\r\n"], ids=["an error", "DONE", "the end"])
    def test_what_ends_too_early_fails(self, response: Response, late: bool, end: bytes) -> None:
        response.read(STREAM_HEAD + chunked(ROLE))
        if late:
            response.read(chunked(content("a")))
        response.read(end if end.startswith(b"0") else chunked(end))
        assert response.got.reports == (["first"] if late else []) + ["failed"]

    def test_a_missing_done_is_added(self, response: Response) -> None:
        response.read(streamed(content("a"), FINISH))
        assert response.got.payload() == content("a") + FINISH + DONE

    def test_events_without_content_have_a_limit(self, response: Response) -> None:
        response.read(STREAM_HEAD)
        while not response.got.is_over:
            response.read(chunked(b": %b\n\n" % (b"x" * 10_000)))
            assert sum(map(len, response.relay.held)) < HELD_EVENTS_BYTES_MAX + 20_000
        assert response.got.failure is Failure.BAD_OUTPUT

    def test_malformed_events_are_dropped(self, response: Response) -> None:
        response.read(streamed(b"data: {no json\n\n", content("a"), b"data: {nor this\n\n", FINISH, DONE))
        assert response.got.payload() == content("a") + FINISH + DONE and response.relay.dropped == 2

    def test_a_stream_where_none_was_asked_for_fails(self) -> None:
        assert Response(WHOLE).read(streamed(*EVENTS)).got.failure is Failure.BAD_OUTPUT

    def test_comments_are_signs_of_life_and_no_events(self, response: Response) -> None:
        response.read(STREAM_HEAD + chunked(content("a")))
        response.read(chunked(b": still here\n\n"))
        assert (response.relay.beats, response.relay.event_count, response.relay.body_bytes) == (1, 1, 0)

    def test_after_its_end_the_client_s_pace_is_forgotten(self, response: Response) -> None:
        response.read(STREAM_HEAD + chunked(content("a")))
        response.relay.pause()
        assert response.engine.is_paused
        response.read(chunked(FINISH, DONE) + b"0\r\n\r\n")
        assert response.got.is_over and not response.engine.is_paused


class TestResumed:
    """A response that continues what another had begun."""

    def resumed(self, *said: str) -> ExpectedResponse:
        transcript = Transcript(0)
        for word in said:
            transcript.keep(chunked(content(word)))
        assert transcript.whole
        splicer = StreamSplicer(transcript, ResumeMethod.REPLAY, "m")
        return msgspec.structs.replace(STREAM, resumed=ResumedStream(splicer, transcript, len(said), 0))

    def test_only_what_is_new_is_passed_on(self) -> None:
        response = Response(self.resumed("a", "b"))
        response.read(STREAM_HEAD + chunked(ROLE, content("a")))
        assert not response.got.reports and response.relay.event_count == 2
        response.read(chunked(content("bc")))
        assert response.got.reports == ["first"] and b'"c"' in response.got.written
        response.read(chunked(FINISH, DONE) + b"0\r\n\r\n")
        assert response.got.reports == ["first", "ended"] and b'"a"' not in response.got.payload()
        assert response.relay.event_count == 4

    def test_another_text_is_a_mismatch(self) -> None:
        response = Response(self.resumed("a", "b")).read(STREAM_HEAD + chunked(content("x")))
        assert response.got.failure is Failure.MISMATCH and response.got.reports == ["failed"]

    def test_it_must_be_a_stream(self) -> None:
        assert Response(self.resumed("a")).read(whole(BODY)).got.failure is Failure.BAD_OUTPUT

    def test_its_listener_may_cancel_it_at_the_first_new_event(self) -> None:
        response = Response(self.resumed("a"))
        response.got.cancelled_at_first = True
        response.read(STREAM_HEAD + chunked(content("ab")))
        LOOP.run_ready()
        assert response.got.reports == ["first"] and not response.got.written and response.engine.is_closed


@pytest.mark.parametrize("data", [whole(BODY), whole(b'{"error":{"message":"no","code":400}}')])
def test_a_listener_may_cancel_a_whole_body_at_its_content(data: bytes) -> None:
    response = Response(WHOLE)
    response.got.cancelled_at_first = True
    response.read(data)
    LOOP.run_ready()
    assert response.got.reports == ["first"] and response.engine.is_closed


def calls(act: Callable[[], object]) -> list[str]:
    """The Python functions that something calls."""
    called: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and "calls.<locals>" not in frame.f_code.co_qualname:
            called.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return [name for name in called if "<lambda>" not in name]


def test_an_event_costs_no_more_calls_than_it_did(response: Response) -> None:
    response.read(STREAM_HEAD + chunked(content("a")))
    event = chunked(content("b"))
    called = calls(lambda: response.connection.data_received(event))
    assert len(called) <= FRAMES_MAX, called
    assert response.relay.event_count == 2


def test_saying_how_a_response_is_read_costs_no_call() -> None:
    operation = OPERATIONS[b"/v1/chat/completions"]
    assert calls(lambda: ExpectedResponse(OPENAI, operation, False, NAMES, True, False, False, None)) == []
