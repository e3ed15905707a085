"""Every client protocol in the folder, a dropped-in one included, keeps the contract that the proxy relies on."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.protocols import sse
from fleetgate.protocols.clients import find, names, openai
from fleetgate.protocols.clients.base import ClientProtocol, missing_members
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.protocols.messages import EventMeaning, Operation, ResumeMethod, Usage
from fleetgate.protocols.prompt_prefix import BLOCK_BYTES, chain_of
from fleetgate.protocols.resume.splice import Mismatch

TYPED: ClientProtocol = openai  # mypy compares every signature of the module with the contract

MODELS = st.sampled_from(["m", "meta/llama-3", 'quo"te', "back\\slash", "ünï😀", "model", "a b"])
TEXTS = st.text(max_size=20) | st.sampled_from(['"model":"m"', "\\", "\u2028", "\r\n\ndata: x\n\n", "[DONE]", "\x00"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "usage", "x"]), inner),
    max_leaves=6,
)
OTHERS = st.dictionaries(st.sampled_from(["metadata", "x", "tools", "stop", "temperature", "prompt"]), VALUES)
BEGINS = st.sampled_from([b"", b"data: ", b"data: {", b"data:", b": ", b"event: error\n", b"event: x\ndata: "])
NUMBERS = st.integers(0, 10**6)
UNSPLICED = (EventMeaning.MALFORMED, EventMeaning.ERROR, EventMeaning.DONE, EventMeaning.COMMENT)  # for the relay
CODES = ["model_not_found", "rate_limited", "internal_error"]
HIDDEN = [b"authorization", b"x-api-key", b"cookie", b"host", b"connection", b"content-length", b"transfer-encoding"]
HIDDEN_ANSWERS = [b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"x-request-id"]
HEADERS = [*HIDDEN, b"accept", b"traceparent", b"content-type", b"server", b"x-fleetgate-region", b"set-cookie"]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A request of a usual shape, and one of the ways to write it."""
    body = {**draw(OTHERS), "model": draw(MODELS), "messages": [{"role": "user", "content": draw(TEXTS)}]}
    body |= {"max_tokens": draw(st.integers(1, 1000)), "stream": draw(st.booleans())}
    body = {key: body[key] for key in draw(st.permutations(list(body)))}
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n ")]))
    return body, json.dumps(body, separators=separators, ensure_ascii=draw(st.booleans())).encode(errors="replace")


EVENTS = st.builds(lambda begin, rest: begin + rest + b"\n\n", BEGINS, st.binary(max_size=60)) | st.builds(
    lambda value: b"data: %b\n\n" % json.dumps(value, separators=(",", ":")).encode(),
    st.dictionaries(st.sampled_from(["type", "choices", "usage", "error", "delta", "response", "code"]), VALUES)
    | st.fixed_dictionaries({"error": st.dictionaries(st.sampled_from(["code", "type"]), VALUES | st.just("²²²"))}),
)


CHAT = {"id": "a", "created": 1, "model": "m", "object": "chat.completion.chunk"}
WORDS = ["a", "b ", "ab c", ""]
STREAMS = st.lists(
    st.builds(
        lambda text, finish, ids: (
            b"data: %b\n\n"
            % json.dumps(
                {
                    **CHAT,
                    "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish, "token_ids": ids}],
                }
            ).encode()
        ),
        st.sampled_from(WORDS),
        st.sampled_from([None, None, None, "stop"]),
        st.none() | st.lists(st.integers(0, 3), max_size=2),
    )
    | st.builds(
        lambda text, number: (
            b"event: response.output_text.delta\ndata: %b\n\n"
            % json.dumps({"type": "response.output_text.delta", "sequence_number": number, "delta": text}).encode()
        ),
        st.sampled_from(WORDS),
        st.integers(0, 9),
    )
    | EVENTS,
    max_size=6,
)
RESUMABLE = st.builds(
    lambda more: json.dumps({"model": "m", "stream": True, "messages": [], "prompt": "p", **more}).encode(),
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0, 0.7, "hot"]),
            "n": st.integers(1, 2),
            "return_token_ids": st.booleans(),
            "stop": st.sampled_from([None, "x", ["y"]]),
            "max_tokens": st.integers(1, 9),
            "tools": st.sampled_from([[], [{"type": "function"}], 5]),
        },
    ),
)


def whole_events(protocol: ClientProtocol, data: bytes) -> list[bytes]:
    """The events in what the protocol made: all of them whole, and none malformed."""
    reader = sse.Events()
    found = reader.feed(data)
    assert found and reader.partial == b""
    for event in found:
        assert sse.as_text(event) is event
        assert protocol.classify_event(event)[0] not in (EventMeaning.MALFORMED, EventMeaning.COMMENT)
    return found


# --- shape ------------------------------------------------------------------------------------------------------------


def check_members(protocol: ClientProtocol) -> None:
    """Every constant and function of the contract, with the parameters that the contract gives them."""
    assert inspect.getdoc(protocol)
    assert missing_members(protocol) == []
    contract = inspect.getmembers(ClientProtocol, inspect.isfunction)
    for name, wanted in [(name, wanted) for name, wanted in contract if not name.startswith("_")]:
        function = getattr(protocol, name)
        assert inspect.getdoc(function), f"{name} has no docstring"
        assert list(inspect.signature(function).parameters) == list(inspect.signature(wanted).parameters)[1:], name


def check_paths(protocol: ClientProtocol) -> None:
    """Paths begin with a slash, have methods, and are told apart by name."""
    operations = protocol.OPERATIONS
    assert len({operation.name for operation in operations.values()}) == len(operations)
    for path, operation in operations.items():
        assert isinstance(operation, Operation) and path.startswith(b"/") and operation.path.startswith(b"/")
        assert {b"POST", b"OPTIONS"} <= set(protocol.methods_of(path).split(b", "))
        assert protocol.resume_path(ResumeMethod.REPLAY, path) == path
    if protocol.MODELS_PATH:
        for path in (protocol.MODELS_PATH, protocol.MODELS_PATH + b"/m"):
            assert {b"GET", b"HEAD", b"OPTIONS"} <= set(protocol.methods_of(path).split(b", "))
    assert protocol.methods_of(b"/no/such/path") == b""


def check_marks(protocol: ClientProtocol) -> None:
    """No text of a model can look like a mark, and no error or end contains one."""
    assert all(begin.startswith((b"data: ", b"event: ")) and begin.endswith(b"{") for begin in protocol.EVENT_BEGINS)
    for operation in protocol.OPERATIONS.values():
        mark = operation.fast_mark
        assert mark and mark not in json.dumps({"text": mark.decode()}, separators=(",", ":")).encode()
        assert mark not in protocol.error_event("internal_error", mark.decode())
        assert mark not in operation.done_mark
        if operation.done_mark:
            assert [protocol.classify_event(event)[0] for event in whole_events(protocol, operation.done_mark)] == [
                EventMeaning.DONE
            ]


def check_prompt_marks(protocol: ClientProtocol) -> None:
    """Prompts that are equal have equal digests, whatever stands before them."""
    for mark in protocol.PROMPT_MARKS:
        prompt = mark + b':"%b"}' % (b"word " * BLOCK_BYTES)
        one, other = (chain_of(b'{"model":"%b",' % name + prompt, b"", protocol.PROMPT_MARKS) for name in (b"a", b"bc"))
        assert one and one == other


def check_headers(protocol: ClientProtocol, headers: dict[bytes, bytes]) -> None:
    """A client's key is read, and neither it nor any framing is passed on."""
    assert protocol.authorization_of({}) == b""
    name, _, value = protocol.CREDENTIAL_HINT.partition(": ")
    key_field = name.lower().encode()
    assert "<key>" in value, "the hint shows where the key goes"
    assert protocol.authorization_of({key_field: value.replace("<key>", "k").encode()}) == b"Bearer k"
    assert protocol.credential_lines("") == b""
    assert b"secret" in protocol.credential_lines("secret") and protocol.credential_lines("secret").endswith(b"\r\n")
    headers = {**headers, key_field: b"k"}
    for lines, hidden in (
        (protocol.request_headers(headers), [*HIDDEN, key_field]),
        (protocol.response_headers(headers), HIDDEN_ANSWERS),
    ):
        assert lines == b"" or lines.endswith(b"\r\n")
        for line in lines.split(b"\r\n")[:-1]:
            field, _, text = line.partition(b": ")
            assert headers[field] == text and field not in hidden and not field.startswith(b"x-fleetgate-")


# --- requests ---------------------------------------------------------------------------------------------------------


def check_request(protocol: ClientProtocol, made: tuple[dict[str, Any], bytes], name: str) -> None:
    """What is read was written; a rewritten body has another model and no other difference."""
    body, data = made
    info = protocol.parse_request(data)
    assert info.model == body["model"] and info.stream == body["stream"]
    assert protocol.output_tokens_max(data) == body["max_tokens"]
    assert protocol.rewrite(data, info, info.model, False) is data
    renamed = protocol.rewrite(data, info, name, False)
    assert json.loads(renamed) == {**body, "model": name}
    before = shared_bytes(data, renamed)
    after = shared_bytes(data[before:][::-1], renamed[before:][::-1])
    assert renamed[before : len(renamed) - after] in json.dumps(name, ensure_ascii=False).encode()
    if any(operation.usage_option for operation in protocol.OPERATIONS.values()):
        asking = protocol.rewrite(data, info, name, True)
        assert protocol.parse_request(asking).wants_usage
        left = json.loads(asking)
        assert len([key for key in left if left[key] != body.get(key)]) <= 1 + (name != info.model)


def shared_bytes(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_any_request(protocol: ClientProtocol, data: bytes) -> None:
    """Any bytes are a request or a clear refusal."""
    try:
        info = protocol.parse_request(data)
    except InvalidBody as error:
        assert error.code in ("invalid_json", "invalid_request") and error.message
        return
    assert info.model and protocol.output_tokens_max(data) >= 0
    protocol.rewrite(data, info, "other", False)


# --- responses and events ---------------------------------------------------------------------------------------------


def check_any_event(protocol: ClientProtocol, event: bytes) -> None:
    """Any bytes mean something, and an error in them has an error's status."""
    meaning, usage = protocol.classify_event(event)
    assert isinstance(meaning, EventMeaning) and (usage is None or isinstance(usage, Usage))
    assert protocol.classify_event(event) == (meaning, usage)
    if meaning not in UNSPLICED:
        choices: dict[int, bool] = {}
        protocol.note_choices(event, choices)
        assert all(isinstance(index, int) for index in choices)
    for data in (event, sse.data_of(event) or b""):
        assert 400 <= protocol.status_of_error(data) < 600
        try:
            usage, is_error = protocol.read_answer(data)
        except Malformed:
            continue
        assert isinstance(is_error, bool) and (usage is None or isinstance(usage, Usage))


def check_usage(protocol: ClientProtocol, prompt: int, output: int) -> None:
    """Usage is read from a whole response, under the names of either of the usual APIs."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "input_tokens": prompt, "output_tokens": output}
    found, is_error = protocol.read_answer(json.dumps({"model": "m", "usage": usage}).encode())
    assert found is not None and (found.prompt, found.output) == (prompt, output) and not is_error
    assert protocol.read_answer(b'{"model":"m"}') == (None, False)
    with pytest.raises(Malformed):
        protocol.read_answer(b'{"model":"m","usa')


def check_rename(protocol: ClientProtocol, upstream: str, asked: str, text: str) -> None:
    """The model name is replaced, and only that."""
    value = {"id": "1", "text": text, "model": upstream, "list": [text]}
    upstream_name, asked_name = (json.dumps(name, ensure_ascii=False).encode() for name in (upstream, asked))
    for ascii_only in (False, True):
        data = b"data: %b\n\n" % json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace")
        renamed = protocol.rename_model(data, upstream_name, asked_name)
        assert json.loads(renamed[6:]) == {**json.loads(data[6:]), "model": asked}
        assert protocol.other_model_name(renamed, asked_name) is None
        other = protocol.other_model_name(data, asked_name)
        assert other is None if upstream == asked else json.loads(other or b"") == upstream


def check_errors(protocol: ClientProtocol, status: int, code: str, message: str) -> None:
    """Errors are JSON that says message, type and code, inside a stream one event that is an error."""
    body = protocol.error_body(status, code, message, "model")
    said = list(leaves(json.loads(body)))
    assert message in said and code in said and b'"type":' in body
    assert protocol.read_answer(body)[1], "its own error is an error"
    (event,) = whole_events(protocol, protocol.error_event(code, message))
    assert protocol.classify_event(event)[0] is EventMeaning.ERROR
    assert message in list(leaves(json.loads(sse.data_of(event) or b"")))
    assert whole_events(protocol, protocol.event_of_body(body))


def leaves(value: Any) -> Iterator[Any]:
    """Every value in JSON that is neither a list nor an object."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    for one in inner or ():
        yield from leaves(one)


def check_models(protocol: ClientProtocol, models: list[str]) -> None:
    """Every model is listed, under its own name."""
    listed = list(leaves(json.loads(protocol.models_body(dict.fromkeys(models, "owner")))))
    assert set(models) <= set(listed)
    for model in models:
        assert model in list(leaves(json.loads(protocol.model_body(model, "owner"))))


# --- resuming ---------------------------------------------------------------------------------------------------------


def check_resume(protocol: ClientProtocol, body: bytes, first: list[bytes], second: list[bytes]) -> None:
    """Whatever broke off and whatever follows it, the outcome is events, a mismatch or a malformed event."""
    for path, operation in protocol.OPERATIONS.items():
        methods = protocol.resume_methods(body, operation)
        assert methods <= frozenset(ResumeMethod)
        for method in methods:
            assert protocol.resume_path(method, path) in protocol.OPERATIONS
            transcript = protocol.new_transcript(operation, 2)
            for event in first:
                transcript.keep(event)
            if not transcript.runs or not transcript.whole:
                continue
            request = protocol.resume_body(method, body, transcript, "vllm")
            assert request == body if method is ResumeMethod.REPLAY else request is None or json.loads(request)
            if request is not None:
                splicer = protocol.new_splicer(transcript, method, "m", operation)
                for event in second:
                    if protocol.classify_event(event)[0] in UNSPLICED:
                        continue
                    try:
                        taken = splicer.take(sse.data_of(event) or b"")
                    except (Mismatch, Malformed):
                        break
                    assert taken is None or whole_events(protocol, taken)


# --- the suite --------------------------------------------------------------------------------------------------------

AnyRequest = tuple[dict[str, Any], bytes]
DAMAGE = st.sampled_from([b"", b'"', b"}", b"\\", b"\xff", b"\x00"])
STATUSES = st.sampled_from([400, 401, 403, 404, 413, 429, 500, 502, 503])
HEADS = st.dictionaries(st.sampled_from(HEADERS), st.sampled_from([b"", b"a", b"Bearer k"]))


@pytest.mark.parametrize("name", names())
class TestEveryProtocol:
    """The suite that a new file must pass; nothing else names it."""

    def test_it_has_the_shape(self, name: str) -> None:
        check_members(find(name))
        check_paths(find(name))
        check_marks(find(name))
        check_prompt_marks(find(name))

    @given(headers=HEADS)
    def test_headers(self, name: str, headers: dict[bytes, bytes]) -> None:
        check_headers(find(name), headers)

    @given(made=bodies(), model=MODELS)
    def test_a_request_is_read_and_rewritten(self, name: str, made: AnyRequest, model: str) -> None:
        check_request(find(name), made, model)

    @given(made=bodies(), at=st.integers(0, 200), damage=DAMAGE)
    def test_a_damaged_request_is_read_or_refused(self, name: str, made: AnyRequest, at: int, damage: bytes) -> None:
        check_any_request(find(name), made[1][:at] + damage + made[1][at + 1 :])
        check_any_request(find(name), made[1][:at])

    @given(event=EVENTS)
    def test_any_event_means_something(self, name: str, event: bytes) -> None:
        check_any_event(find(name), event)

    @given(prompt=NUMBERS, output=NUMBERS)
    def test_usage(self, name: str, prompt: int, output: int) -> None:
        check_usage(find(name), prompt, output)

    @given(upstream=MODELS, asked=MODELS, text=TEXTS)
    def test_model_names(self, name: str, upstream: str, asked: str, text: str) -> None:
        check_rename(find(name), upstream, asked, text)

    @given(status=STATUSES, code=st.sampled_from(CODES), message=TEXTS)
    def test_errors(self, name: str, status: int, code: str, message: str) -> None:
        check_errors(find(name), status, code, message)

    @given(models=st.lists(MODELS, unique=True))
    def test_models(self, name: str, models: list[str]) -> None:
        check_models(find(name), models)

    @given(body=RESUMABLE, first=STREAMS, second=STREAMS)
    def test_resuming(self, name: str, body: bytes, first: list[bytes], second: list[bytes]) -> None:
        check_resume(find(name), body, first, second)


def test_an_unknown_protocol_is_a_clear_error() -> None:
    with pytest.raises(KeyError, match="openai"):
        find("gopher")
