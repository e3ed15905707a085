"""The official SDK against a worker, with the wall as engine: what its users see, down to the exception types."""

import json
from collections.abc import Iterator

import openai
import pytest

from tests.loopback.rig import gateway
from tests.loopback.test_edge_keys import GOOD, GOOD_KEY
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_replies import DONE, EVENT_STREAM, event, finish, role
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane

MODELS = {"models": {**EVERY_MODEL, "tools": "tools", "embed": "embed", "respond": "respond", "json": "json"}}
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}


async def send_stream(line: Line, payload: bytes) -> None:
    line.end()
    line.write(EVENT_STREAM + b"content-length: %d\r\n\r\n" % len(payload) + payload)


async def send_json(line: Line, body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    line.end()
    line.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data)


async def tools(line: Line, seen: Seen) -> None:
    """A tool call whose arguments come in pieces."""
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"a"', ": 1, ", '"b": 2}')]
    deltas: list[dict[str, object]] = [{"tool_calls": [call]} for call in (CALL, *pieces)]
    payload = b"".join([role("tools"), *(event("tools", delta) for delta in deltas)])
    await send_stream(line, payload + event("tools", {}, "tool_calls") + DONE)


async def embed(line: Line, seen: Seen) -> None:
    """One vector for each input."""
    data = [{"object": "embedding", "index": n, "embedding": [0.5, n]} for n, _ in enumerate(seen.ask["input"])]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    await send_json(line, {"object": "list", "model": "embed", "data": data, "usage": usage})


def response(status: str) -> dict[str, object]:
    text = {"type": "output_text", "text": "Good day.", "annotations": []}
    message = {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [text]}
    return {
        "id": "r", "object": "response", "created_at": 1, "status": status, "model": "respond", "output": [message],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "usage": {"input_tokens": 4, "output_tokens": 2, "total_tokens": 6,
                  "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
    }  # fmt: skip


async def respond(line: Line, seen: Seen) -> None:
    """The Responses API, streamed or not: its streams end with an event of their own and without [DONE]."""
    if not seen.ask.get("stream"):
        await send_json(line, response("completed"))
        return
    place = {"item_id": "m", "output_index": 0, "content_index": 0, "logprobs": []}
    events: list[dict[str, object]] = [{"type": "response.created", "response": response("in_progress")}]
    events += [{"type": "response.output_text.delta", "delta": text, **place} for text in ("Good ", "day", ".")]
    events += [{"type": "response.completed", "response": response("completed")}]
    payload = b"".join(
        f"event: {one['type']}\ndata: {json.dumps({**one, 'sequence_number': n}, separators=(',', ':'))}\n\n".encode()
        for n, one in enumerate(events)
    )
    await send_stream(line, payload)


async def structured(line: Line, seen: Seen) -> None:
    """Content that is JSON itself, as asked with response_format."""
    assert seen.ask["response_format"]["type"] == "json_schema"
    await send_stream(
        line,
        role("json") + event("json", {"content": '{"answer":'}) + event("json", {"content": "42}"}) + finish("json"),
    )


@pytest.fixture(scope="module")
def sdk() -> Iterator[Plane]:
    with plane(auth="keys") as made:
        made.wall.replies.update({"tools": tools, "embed": embed, "respond": respond, "json": structured})
        yield made


@pytest.fixture(autouse=True)
def fresh(sdk: Plane) -> None:
    """Every test has an engine of which nothing is known."""
    deployments = tuple(sdk.deployments(MODELS))
    sdk.rig.publish(gateways=(gateway("one"),), deployments=deployments, keys=(GOOD_KEY,))
    sdk.rig.wait_until_used()
    sdk.wall.forget()


def client(made: Plane, retries: int = 0, key: str = GOOD) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{made.port}/v1", api_key=key, max_retries=retries)


MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def test_chat(sdk: Plane) -> None:
    with client(sdk) as api:
        raw = api.chat.completions.with_raw_response.create(model="ok", messages=MESSAGES)
        answer = raw.parse()
        assert answer.choices[0].message.content == "Good day." and answer.usage is not None
        assert raw.headers["x-fleetgate-deployment"] == "one" and raw.headers["x-fleetgate-region"] == "region-one"
        assert answer._request_id == raw.headers["x-request-id"] == sdk.wall.seen[-1].headers["x-request-id"][0]


@pytest.mark.parametrize("model", ["ok", "in-pieces", "at-once", "crlf", "no-done", "torn", "malformed", "until-close"])
def test_streams(sdk: Plane, model: str) -> None:
    with client(sdk) as api:
        chunks = list(api.chat.completions.create(model=model, messages=MESSAGES, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "tok" in text and chunks[-1].choices[0].finish_reason == "stop"


def test_streamed_usage_only_when_asked(sdk: Plane) -> None:
    with client(sdk) as api:
        options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
        stream = api.chat.completions.create(model="ok", messages=MESSAGES, stream=True, stream_options=options)
        assert list(stream)[-1].usage is not None


def test_tools(sdk: Plane) -> None:
    with client(sdk) as api, api.chat.completions.stream(model="tools", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert calls is not None and calls[0].function.name == "add"
    assert json.loads(calls[0].function.arguments) == {"a": 1, "b": 2}


def test_structured_output(sdk: Plane) -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    with client(sdk) as api:
        stream = api.chat.completions.create(
            model="json",
            messages=MESSAGES,
            stream=True,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text) == {"answer": 42}


def test_embeddings(sdk: Plane) -> None:
    with client(sdk) as api:
        made = api.embeddings.create(model="embed", input=["a", "b"], encoding_format="float")
    assert [one.embedding for one in made.data] == [[0.5, 0], [0.5, 1]]


def test_responses(sdk: Plane) -> None:
    with client(sdk) as api:
        assert api.responses.create(model="respond", input="hi").output_text == "Good day."
        events = list(api.responses.create(model="respond", input="hi", stream=True))
        assert [one.type for one in events] == [
            "response.created", *["response.output_text.delta"] * 3, "response.completed",
        ]  # fmt: skip
        assert "stream_options" not in sdk.wall.seen[-1].ask


def test_models(sdk: Plane) -> None:
    with client(sdk) as api:
        assert sorted(model.id for model in api.models.list()) == sorted(MODELS["models"])
        assert api.models.retrieve("ok").id == "ok"


ERRORS: dict[str, tuple[type[openai.APIStatusError], str | None]] = {
    "gone": (openai.NotFoundError, "model_not_found"),
    "404": (openai.NotFoundError, "model_not_found"),
    "429": (openai.RateLimitError, "capacity_exhausted"),
    "400": (openai.BadRequestError, None),
    "422": (openai.UnprocessableEntityError, None),
    "401": (openai.InternalServerError, "upstream_auth_error"),
    "500": (openai.InternalServerError, "upstream_error"),
    "rst-mid": (openai.InternalServerError, "upstream_error"),
}


@pytest.mark.parametrize("model", ERRORS)
def test_errors_have_their_types(sdk: Plane, model: str) -> None:
    kind, code = ERRORS[model]
    with client(sdk) as api, pytest.raises(kind) as caught:
        api.chat.completions.create(model=model, messages=MESSAGES)
    assert caught.value.code == code
    assert code is None or caught.value.message
    assert caught.value.request_id


def test_a_wrong_key_is_an_authentication_error(sdk: Plane) -> None:
    with client(sdk, key="sk-wrong") as api, pytest.raises(openai.AuthenticationError) as caught:
        api.chat.completions.create(model="ok", messages=MESSAGES)
    assert caught.value.code == "invalid_api_key" and not sdk.wall.seen


def test_a_bad_request_is_one(sdk: Plane) -> None:
    with client(sdk) as api, pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "model")


@pytest.mark.parametrize("model", ["rst-mid", "fin-mid", "clean-end", "error-mid", "done-unfinished", "huge-event"])
def test_a_broken_stream_raises_after_what_came(sdk: Plane, model: str) -> None:
    """Without the event inside the stream, a clean end would look like success to the SDK."""
    seen = ""
    with client(sdk) as api, pytest.raises(openai.APIError) as caught:
        for chunk in api.chat.completions.create(model=model, messages=MESSAGES, stream=True):
            seen += chunk.choices[0].delta.content or ""
    assert "tok" in seen and caught.value.code == "upstream_interrupted"


def test_the_sdks_own_retries_do_not_multiply_an_outage(sdk: Plane) -> None:
    """Two retries are allowed to it; the answer to its first one tells it to stop."""
    with client(sdk, retries=2) as api, pytest.raises(openai.InternalServerError):
        api.chat.completions.create(model="500", messages=MESSAGES)
    assert len(sdk.wall.seen) == 2


def test_the_sdk_waits_as_it_is_told_and_then_gets_through(sdk: Plane) -> None:
    seen = sdk.wall.seen

    async def full_once(line: Line, one: Seen) -> None:
        if len(seen) == 1:
            line.end()
            line.write(b"HTTP/1.1 429 Too Many\r\nretry-after-ms: 50\r\ncontent-length: 0\r\n\r\n")
        else:
            await sdk.wall.replies["ok"](line, one)

    sdk.wall.replies["slow"] = full_once
    with client(sdk, retries=2) as api:
        answer = api.chat.completions.create(model="slow", messages=MESSAGES)
    assert answer.choices[0].message.content == "Good day." and len(seen) == 2
