"""OpenAI requests, events and errors, by example."""

import json

import pytest

from fleetgate.protocols.clients.openai import (
    OPERATIONS,
    classify_event,
    error_body,
    error_event,
    parse_request,
    read_answer,
    rewrite,
)
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.protocols.messages import EventMeaning


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def choice(finish: str | None = None, **delta: object) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


MEANINGS: dict[str, tuple[bytes, EventMeaning]] = {
    "content": (choice(content="a"), EventMeaning.CONTENT),
    "empty content": (choice(content=""), EventMeaning.OTHER),
    "role": (choice(role="assistant"), EventMeaning.OTHER),
    "role and null": (choice(role="assistant", content=None), EventMeaning.OTHER),
    "tool call": (choice(tool_calls=[{"index": 0}]), EventMeaning.CONTENT),
    "empty tool calls": (choice(tool_calls=[]), EventMeaning.OTHER),
    "function call": (choice(function_call={"name": "f"}), EventMeaning.CONTENT),
    "reasoning": (choice(reasoning_content="hm"), EventMeaning.CONTENT),
    "reasoning, newer": (choice(reasoning="hm"), EventMeaning.CONTENT),
    "refusal": (choice(refusal="no"), EventMeaning.CONTENT),
    "finish": (choice("stop"), EventMeaning.FINISH),
    "finish with content": (choice("length", content="a"), EventMeaning.FINISH),
    "finish error": (choice("error"), EventMeaning.ERROR),
    "text of completions": (event(choices=[{"index": 0, "text": "a", "finish_reason": None}]), EventMeaning.CONTENT),
    "usage": (event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2}), EventMeaning.USAGE),
    "no choices": (event(choices=[], prompt_filter_results=[]), EventMeaning.OTHER),
    "error": (event(error={"message": "x"}), EventMeaning.ERROR),
    "error is a string": (event(error="x"), EventMeaning.ERROR),
    "error is null": (event(error=None, choices=[{"delta": {"content": "a"}}]), EventMeaning.CONTENT),
    "named error": (b'event: error\ndata: {"error":{"message":"x"}}\n\n', EventMeaning.ERROR),
    "done": (b"data: [DONE]\n\n", EventMeaning.DONE),
    "done without space": (b"data:[DONE]\r\n\r\n", EventMeaning.DONE),
    "comment": (b": hi\n\n", EventMeaning.COMMENT),
    "not JSON": (b"data: {\n\n", EventMeaning.MALFORMED),
    "not an object": (b"data: 5\n\n", EventMeaning.MALFORMED),
    "not UTF-8": (b'data: {"x":"\xff"}\n\n', EventMeaning.MALFORMED),
    "deep": (b"data: " + b'{"a":' * 100_000 + b"\n\n", EventMeaning.MALFORMED),
    "responses delta": (event(type="response.output_text.delta", delta="a"), EventMeaning.CONTENT),
    "responses created": (event(type="response.created", response={}), EventMeaning.OTHER),
    "responses completed": (event(type="response.completed", response={"usage": {}}), EventMeaning.FINISH),
    "responses failed": (event(type="response.failed", response={}), EventMeaning.ERROR),
    "responses error": (event(type="error", message="x"), EventMeaning.ERROR),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_events_mean(name: str) -> None:
    data, meaning = MEANINGS[name]
    assert classify_event(data)[0] is meaning


def test_usage_under_either_name() -> None:
    _, usage = classify_event(event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}))
    assert usage is not None and (usage.prompt, usage.output) == (3, 4)
    _, usage = classify_event(
        event(type="response.completed", response={"usage": {"input_tokens": 5, "output_tokens": 6}})
    )
    assert usage is not None and (usage.prompt, usage.output) == (5, 6)
    assert read_answer(b'{"usage":null}') == (None, False)
    assert read_answer(b'{"error":{"code":500}}') == (None, True)


def test_the_fast_mark_is_in_content_only() -> None:
    mark = OPERATIONS[b"/v1/chat/completions"].fast_mark
    for data, meaning in MEANINGS.values():
        if mark in data:
            assert meaning in (EventMeaning.CONTENT, EventMeaning.OTHER)


def test_errors_are_shaped_as_the_sdk_reads_them() -> None:
    error = json.loads(error_body(404, "model_not_found", 'no "x"', "model"))["error"]
    assert error == {"message": 'no "x"', "type": "not_found_error", "param": "model", "code": "model_not_found"}
    assert error_event("c", "m").startswith(b'data: {"error":') and error_event("c", "m").endswith(b"}\n\n")


def test_stream_options_keep_what_else_they_say() -> None:
    body = b'{"stream_options":{"a":1e99,"include_usage":false},"model":"m","stream":true}'
    info = parse_request(body)
    wanted = b'{"stream_options":{"a":1e99,"include_usage":true},"model":"m","stream":true}'
    assert rewrite(body, info, "m", True) == wanted


def test_a_model_given_twice_is_found_beside_stream_options() -> None:
    with pytest.raises(InvalidBody):
        parse_request(b'{"model":"a","stream_options":{},"model":"a"}')
