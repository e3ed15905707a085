"""The conformance suites can fail: each wrong client protocol and each wrong transport breaks a check."""

import json
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.protocols import sse
from fleetgate.protocols.clients import openai
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.messages import EventMeaning, Operation, ResumeMethod
from fleetgate.proxy.transport.asyncio_transport import AsyncioTransport
from fleetgate.proxy.transport.interface import UpstreamResponse
from tests.conformance import test_client_protocols as protocols
from tests.conformance.test_transports import RULES
from tests.conformance.toys import say
from tests.conformance.transport_rig import MemoryWorld, run

# --- client protocols -------------------------------------------------------------------------------------------------

BODY = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}], "max_tokens": 7}
MADE = BODY, json.dumps(BODY).encode()
HEADERS = dict.fromkeys(protocols.HEADERS, b"a")
WORD = b'event: word\ndata: {"word":"a"}\n\n'


def broken(original: ModuleType = say, **changes: object) -> ClientProtocol:
    """The protocol with other members."""
    names = [*ClientProtocol.__annotations__, *(name for name in vars(ClientProtocol) if not name.startswith("_"))]
    return cast(ClientProtocol, SimpleNamespace(**{name: getattr(original, name) for name in names} | changes))


def operation(**changes: Any) -> dict[bytes, Operation]:
    """The toy's operation with other marks."""
    return {b"/say": Operation(**{"name": "say", "path": b"/speak", "fast_mark": b'"word":"', **changes})}


def rewritten(edit: Callable[[bytes], bytes]) -> Callable[..., bytes]:
    """A `rewrite` that edits its result."""
    return lambda body, info, upstream_name, add_usage: edit(openai.rewrite(body, info, upstream_name, add_usage))


def renamed_parameter(names: dict[str, str]) -> bytes:
    """A `models_body` that cannot be called by the contract's names."""
    return b"{}"


def never_malformed(body: bytes) -> tuple[None, bool]:
    """A `read_answer` that takes everything for a whole response."""
    try:
        return cast(tuple[None, bool], say.read_answer(body))
    except Malformed:
        return None, False


def once(event: bytes, seen: list[bytes] = []) -> tuple[EventMeaning, None]:  # noqa: B006
    """A `classify_event` with a memory."""
    seen.append(event)
    return (EventMeaning.CONTENT if len(seen) % 2 else EventMeaning.OTHER), None


shape = protocols.check_members
paths = protocols.check_paths
marks = protocols.check_marks
headers = partial(protocols.check_headers, headers=HEADERS)
request = partial(protocols.check_request, made=MADE, name="other")
same_name = partial(protocols.check_request, made=MADE, name="m")
any_request = partial(protocols.check_any_request, data=b'{"model":')
an_event = partial(protocols.check_any_event, event=WORD)
usage = partial(protocols.check_usage, prompt=3, output=4)
rename = partial(protocols.check_rename, upstream="m", asked="other", text="m")
errors = partial(protocols.check_errors, status=404, code="model_not_found", message="no such model")
models = partial(protocols.check_models, models=["m", "n"])
CHAT = [
    b'data: {"id":"a","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"b"},"finish_reason":null}]}\n\n'
]
resume = partial(protocols.check_resume, body=b'{"model":"m","stream":true,"temperature":0}', first=CHAT, second=CHAT)

WRONG: dict[str, tuple[Callable[[ClientProtocol], None], ClientProtocol]] = {
    "a parameter of another name": (shape, broken(models_body=renamed_parameter)),
    "no docstring": (shape, broken(methods_of=lambda path: b"POST, OPTIONS")),
    "a path without a slash": (paths, broken(OPERATIONS={b"say": say.OPERATIONS[b"/say"]})),
    "two operations of one name": (paths, broken(OPERATIONS=dict.fromkeys((b"/a", b"/b"), say.OPERATIONS[b"/say"]))),
    "methods of every path": (paths, broken(methods_of=lambda path: b"POST, GET, HEAD, OPTIONS")),
    "no OPTIONS": (paths, broken(methods_of=lambda path: b"POST" if path == b"/say" else b"")),
    "another path for a replay": (paths, broken(resume_path=lambda method, path: b"/other")),
    "a mark that a text can contain": (marks, broken(OPERATIONS=operation(fast_mark=b"word"))),
    "no mark": (marks, broken(OPERATIONS=operation(fast_mark=b""))),
    "a mark that an error contains": (marks, broken(OPERATIONS=operation(fast_mark=b'"oops":'))),
    "a last event that does not end": (marks, broken(OPERATIONS=operation(done_mark=b"data: {}\n"))),
    "a last event that is no end": (marks, broken(OPERATIONS=operation(done_mark=b'data: {"x":1}\n\n'))),
    "events that begin anywhere": (marks, broken(EVENT_BEGINS=(b"",))),
    "prompts that the mark misses": (protocols.check_prompt_marks, broken(PROMPT_MARKS=(b"",))),
    "another header than the hint's": (headers, broken(CREDENTIAL_HINT="Authorization: Bearer <key>")),
    "a hint without `<key>`": (headers, broken(CREDENTIAL_HINT="X-Say-Key: key")),
    "a key without Bearer": (headers, broken(authorization_of=lambda headers: headers.get(b"x-say-key", b""))),
    "a key that was not sent": (headers, broken(authorization_of=lambda headers: b"Bearer k")),
    "a credential without a line end": (headers, broken(credential_lines=lambda value: value.encode())),
    "the client's key passed on": (headers, broken(request_headers=lambda h: b"x-say-key: k\r\n")),
    "cookies passed on": (headers, broken(request_headers=lambda headers: b"cookie: a\r\n")),
    "framing passed on": (headers, broken(response_headers=lambda headers: b"content-length: a\r\n")),
    "another byte": (request, broken(rewrite=rewritten(lambda body: body.replace(b'"stream": ', b'"stream":  ')))),
    "a member less": (request, broken(rewrite=rewritten(lambda body: body.replace(b', "max_tokens": 7', b"")))),
    "another value": (request, broken(rewrite=rewritten(lambda body: body.replace(b"7", b"8")))),
    "the model's old name": (request, broken(rewrite=lambda body, info, upstream_name, add_usage: body)),
    "a copy for nothing": (same_name, broken(rewrite=rewritten(lambda body: bytes(bytearray(body))))),
    "usage that is not asked for": (
        request,
        broken(openai, rewrite=lambda body, info, name, add_usage: openai.rewrite(body, info, name, False)),
    ),
    "no length": (request, broken(output_tokens_max=lambda body: 0)),
    "any other exception": (any_request, broken(parse_request=json.loads)),
    "an event that raises": (an_event, broken(classify_event=lambda event: json.loads(event))),
    "an event with two meanings": (an_event, broken(classify_event=once)),
    "an error with status 200": (an_event, broken(status_of_error=lambda data: 200)),
    "no usage": (usage, broken(read_answer=lambda body: (None, False))),
    "a cut answer that is whole": (usage, broken(read_answer=never_malformed)),
    "a name replaced in a text": (rename, broken(rename_model=lambda data, old, new: data.replace(old, new))),
    "a name not replaced": (rename, broken(rename_model=lambda data, old, new: data)),
    "a name not found": (rename, broken(other_model_name=lambda data, asked: None)),
    "an error without its message": (errors, broken(error_body=lambda status, code, message, param=None: b"{}")),
    "an error that is no error": (errors, broken(read_answer=lambda body: (None, False))),
    "an error event without an end": (errors, broken(error_event=lambda code, message: b'data: {"oops":1}\n')),
    "an error event that is content": (errors, broken(error_event=lambda code, message: WORD)),
    "a body that is no event": (errors, broken(event_of_body=lambda body: body)),
    "a model not listed": (models, broken(models_body=lambda models: b'["m"]')),
    "a model of another name": (models, broken(model_body=lambda name, owner: b'{"id":"m"}')),
    "a way that is none": (resume, broken(openai, resume_methods=lambda body, operation: frozenset({"hope"}))),
    "a replay of another body": (
        resume,
        broken(
            openai,
            resume_methods=lambda body, operation: frozenset({ResumeMethod.REPLAY}),
            resume_body=lambda method, body, transcript, engine: body + b" ",
        ),
    ),
    "a resumed path that is unknown": (
        resume,
        broken(
            openai,
            resume_methods=lambda body, operation: frozenset({ResumeMethod.PREFILL}),
            resume_path=lambda method, path: b"/other",
        ),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_protocol_fails_its_check(what: str) -> None:
    check, protocol = WRONG[what]
    with pytest.raises((AssertionError, ValueError, TypeError, pytest.fail.Exception)):
        check(protocol)


@pytest.mark.parametrize("protocol", [openai, say])
def test_the_checks_pass_for_the_right_ones(protocol: ModuleType) -> None:
    for check in {check for check, _ in WRONG.values()}:
        check(cast(ClientProtocol, protocol))
    assert sse.data_of(WORD)


# --- transports -------------------------------------------------------------------------------------------------------


class Meddling:
    """Stands between a transport and its listener, and hands everything on."""

    def __init__(self, listener: Any) -> None:
        self.listener = listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self.listener, name)


class FirstTwice(Meddling):
    """The first content is reported twice."""

    def on_first(self, response: UpstreamResponse) -> None:
        self.listener.on_first(response)
        self.listener.on_first(response)


class EndsTwice(Meddling):
    """The end is reported twice."""

    def on_ended(self, response: UpstreamResponse, tail: bytes) -> None:
        self.listener.on_ended(response, tail)
        self.listener.on_ended(response, tail)


class NoEnd(Meddling):
    """The end is not reported."""

    def on_ended(self, response: UpstreamResponse, tail: bytes) -> None:
        pass


class NoTail(Meddling):
    """The last bytes are lost."""

    def on_ended(self, response: UpstreamResponse, tail: bytes) -> None:
        self.listener.on_ended(response, b"")


class NoFailure(Meddling):
    """A broken response ends as a good one does."""

    def on_failed(self, response: UpstreamResponse, event: AttemptFailed) -> None:
        self.listener.on_ended(response, b"")


class StaleIsFailure(Meddling):
    """A closed kept connection counts against the Endpoint."""

    def on_stale(self, response: UpstreamResponse) -> None:
        self.listener.on_failed(response, AttemptFailed(Failure.BROKEN, True, 1.0))


class FailureIsStale(Meddling):
    """A broken response counts as a closed kept connection."""

    def on_failed(self, response: UpstreamResponse, event: AttemptFailed) -> None:
        self.listener.on_stale(response)


class NotConnectedIsFailure(Meddling):
    """A refused dial is reported as a broken response."""

    def on_not_connected(self, response: UpstreamResponse, failure: Failure, reason: str) -> None:
        self.listener.on_failed(response, AttemptFailed(failure, True, 1.0))


class NotConnectedIsSilent(Meddling):
    """A refused dial is not reported."""

    def on_not_connected(self, response: UpstreamResponse, failure: Failure, reason: str) -> None:
        pass


class NoDialReport(Meddling):
    """A new connection is not reported."""

    def on_connected(self, response: UpstreamResponse) -> None:
        pass


class OtherByte(Meddling):
    """A byte of the payload is changed."""

    def write(self, data: bytes) -> None:
        self.listener.write(data.replace(b'"b"', b'"B"'))


class WritesEarly(Meddling):
    """Something is written before the first content."""

    def on_first(self, response: UpstreamResponse) -> None:
        self.listener.write(b"0\r\n\r\n")
        self.listener.on_first(response)


class MeddlingTransport(AsyncioTransport):
    """The built-in transport with a meddler before each listener."""

    __slots__ = ()
    meddler: type[Meddling] = Meddling

    def send(self, pool: Any, request: Any, expected: Any, listener: Any, **options: Any) -> Any:
        return super().send(pool, request, expected, self.meddler(listener), **options)


class ReportsAtOnce(AsyncioTransport):
    """It reports before `send` has returned."""

    __slots__ = ()

    def send(self, pool: Any, request: Any, expected: Any, listener: Any, **options: Any) -> Any:
        response = super().send(pool, request, expected, listener, **options)
        listener.on_dial_slow(response)
        return response


class SendsTwice(AsyncioTransport):
    """It sends each request twice."""

    __slots__ = ()

    def send(self, pool: Any, request: Any, *rest: Any, **options: Any) -> Any:
        return super().send(pool, (*request, *request), *rest, **options)


class OtherRequest(AsyncioTransport):
    """It adds a header."""

    __slots__ = ()

    def send(self, pool: Any, request: Any, *rest: Any, **options: Any) -> Any:
        (data,) = request
        return super().send(pool, (data.replace(b"\r\n", b"\r\nx-more: 1\r\n", 1),), *rest, **options)


class KeepsNothing(AsyncioTransport):
    """It makes a connection for each request."""

    __slots__ = ()

    def send(self, *args: Any, fresh: bool = False, **options: Any) -> Any:
        return super().send(*args, fresh=True, **options)


class IgnoresFresh(AsyncioTransport):
    """It uses a kept connection where a new one is required."""

    __slots__ = ()

    def send(self, *args: Any, fresh: bool = False, **options: Any) -> Any:
        return super().send(*args, fresh=False, **options)


def deaf_to(call: str) -> type[AsyncioTransport]:
    """A transport whose responses ignore a call."""

    class Deaf(AsyncioTransport):
        __slots__ = ()

        def send(self, *args: Any, **options: Any) -> Any:
            response = super().send(*args, **options)
            setattr(response, call, lambda: False)
            return response

    return Deaf


def meddling(meddler: type[Meddling]) -> type[AsyncioTransport]:
    """A transport with this meddler."""
    return type(meddler.__name__, (MeddlingTransport,), {"__slots__": (), "meddler": meddler})


BROKEN_TRANSPORTS = [
    *map(
        meddling,
        (
            FirstTwice,
            EndsTwice,
            NoEnd,
            NoTail,
            NoFailure,
            StaleIsFailure,
            FailureIsStale,
            NotConnectedIsFailure,
            NotConnectedIsSilent,
            NoDialReport,
            OtherByte,
            WritesEarly,
        ),
    ),
    ReportsAtOnce,
    SendsTwice,
    OtherRequest,
    KeepsNothing,
    IgnoresFresh,
]


def broken_rules(transport: type[AsyncioTransport]) -> list[str]:
    """The rules that a transport breaks, on the in-memory network."""
    module = cast(ModuleType, SimpleNamespace(NAME="broken", make=transport))
    broken = []
    for rule in RULES:
        try:
            run(MemoryWorld(), module, rule)
        except Exception:
            broken.append(rule.__name__)
    return broken


@pytest.mark.parametrize("transport", BROKEN_TRANSPORTS, ids=lambda transport: transport.__name__)
def test_a_wrong_transport_breaks_a_rule(transport: type[AsyncioTransport]) -> None:
    assert broken_rules(transport)


@pytest.mark.parametrize("call", ["cancel", "pause", "resume", "finish"])
def test_a_response_that_ignores_a_call_breaks_a_rule(call: str) -> None:
    assert broken_rules(deaf_to(call))


def test_the_rules_hold_behind_a_meddler_that_changes_nothing() -> None:
    assert not broken_rules(meddling(Meddling))
