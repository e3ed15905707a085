"""What bodies ask and what events mean."""

import json

import pytest

from fleetgate.protocols.clients.openai import (
    OPERATIONS,
    InvalidBody,
    Meaning,
    error_body,
    error_event,
    read_answer,
    read_ask,
    rewrite,
    understand,
)


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def choice(finish: str | None = None, **delta: object) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


MEANINGS: dict[str, tuple[bytes, Meaning]] = {
    "content": (choice(content="a"), Meaning.CONTENT),
    "empty content": (choice(content=""), Meaning.OTHER),
    "role": (choice(role="assistant"), Meaning.OTHER),
    "role and null": (choice(role="assistant", content=None), Meaning.OTHER),
    "tool call": (choice(tool_calls=[{"index": 0}]), Meaning.CONTENT),
    "empty tool calls": (choice(tool_calls=[]), Meaning.OTHER),
    "function call": (choice(function_call={"name": "f"}), Meaning.CONTENT),
    "reasoning": (choice(reasoning_content="hm"), Meaning.CONTENT),
    "reasoning, newer": (choice(reasoning="hm"), Meaning.CONTENT),
    "refusal": (choice(refusal="no"), Meaning.CONTENT),
    "finish": (choice("stop"), Meaning.FINISH),
    "finish with content": (choice("length", content="a"), Meaning.FINISH),
    "finish error": (choice("error"), Meaning.ERROR),
    "text of completions": (event(choices=[{"index": 0, "text": "a", "finish_reason": None}]), Meaning.CONTENT),
    "usage": (event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2}), Meaning.USAGE),
    "no choices": (event(choices=[], prompt_filter_results=[]), Meaning.OTHER),
    "error": (event(error={"message": "x"}), Meaning.ERROR),
    "error is a string": (event(error="x"), Meaning.ERROR),
    "error is null": (event(error=None, choices=[{"delta": {"content": "a"}}]), Meaning.CONTENT),
    "named error": (b'event: error\ndata: {"error":{"message":"x"}}\n\n', Meaning.ERROR),
    "done": (b"data: [DONE]\n\n", Meaning.DONE),
    "done without space": (b"data:[DONE]\r\n\r\n", Meaning.DONE),
    "comment": (b": hi\n\n", Meaning.COMMENT),
    "not JSON": (b"data: {\n\n", Meaning.MALFORMED),
    "not an object": (b"data: 5\n\n", Meaning.MALFORMED),
    "not UTF-8": (b'data: {"x":"\xff"}\n\n', Meaning.MALFORMED),
    "deep": (b"data: " + b'{"a":' * 100_000 + b"\n\n", Meaning.MALFORMED),
    "responses delta": (event(type="response.output_text.delta", delta="a"), Meaning.CONTENT),
    "responses created": (event(type="response.created", response={}), Meaning.OTHER),
    "responses completed": (event(type="response.completed", response={"usage": {}}), Meaning.FINISH),
    "responses failed": (event(type="response.failed", response={}), Meaning.ERROR),
    "responses error": (event(type="error", message="x"), Meaning.ERROR),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_events_mean(name: str) -> None:
    data, meaning = MEANINGS[name]
    assert understand(data)[0] is meaning


def test_usage_under_either_name() -> None:
    _, usage = understand(event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}))
    assert usage is not None and (usage.prompt, usage.output) == (3, 4)
    _, usage = understand(event(type="response.completed", response={"usage": {"input_tokens": 5, "output_tokens": 6}}))
    assert usage is not None and (usage.prompt, usage.output) == (5, 6)
    assert read_answer(b'{"usage":null}') == (None, False)
    assert read_answer(b'{"error":{"code":500}}') == (None, True)


def test_the_fast_mark_is_in_content_only() -> None:
    mark = OPERATIONS[b"/v1/chat/completions"].fast_mark
    for data, meaning in MEANINGS.values():
        if mark in data:
            assert meaning in (Meaning.CONTENT, Meaning.OTHER)


def test_errors_are_shaped_as_the_sdk_reads_them() -> None:
    error = json.loads(error_body(404, "model_not_found", 'no "x"', "model"))["error"]
    assert error == {"message": 'no "x"', "type": "not_found_error", "param": "model", "code": "model_not_found"}
    assert error_event("c", "m").startswith(b'data: {"error":') and error_event("c", "m").endswith(b"}\n\n")


def test_stream_options_keep_what_else_they_say() -> None:
    body = b'{"stream_options":{"a":1e99,"include_usage":false},"model":"m","stream":true}'
    ask = read_ask(body)
    wanted = b'{"stream_options":{"a":1e99,"include_usage":true},"model":"m","stream":true}'
    assert rewrite(body, ask, "m", True) == wanted


def test_a_model_given_twice_is_found_beside_stream_options() -> None:
    with pytest.raises(InvalidBody):
        read_ask(b'{"model":"a","stream_options":{},"model":"a"}')
