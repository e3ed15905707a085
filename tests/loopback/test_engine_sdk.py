"""The simulated engine through the official SDK."""

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from fleetgate.engine.text_generator import TextGenerator
from tests.loopback.engines import engine, metric

HELLO: Any = [{"role": "user", "content": "hello there"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Step(pydantic.BaseModel):
    """A part of a structured response."""

    title: str
    minutes: int


class Recipe(pydantic.BaseModel):
    """A structured response with references and lists."""

    name: str
    steps: list[Step]
    easy: bool


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """An engine that responds at once."""
    with engine("--model", "m1", "--model", "m2", "--prefill-tokens-per-s", "0", "--decode-base-s", "0") as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    """The SDK, without its own retries."""
    with openai.OpenAI(base_url=base_url, api_key="any", max_retries=0) as sdk:
        yield sdk


def test_chat_has_the_same_text_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="m1", messages=HELLO, max_tokens=7)
    stream = client.chat.completions.create(
        model="m1", messages=HELLO, max_tokens=7, stream=True, stream_options={"include_usage": True}, n=1
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text.split()) == 7
    assert whole.choices[0].finish_reason == "length"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 7
    assert chunks[-1].usage == whole.usage


def test_legacy_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="m2", prompt="once upon", max_tokens=5)
    chunks = list(client.completions.create(model="m2", prompt="once upon", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_responses_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="m1", input="hello", instructions="be brief", max_output_tokens=6)
    with client.responses.stream(model="m1", input="hello", instructions="be brief", max_output_tokens=6) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 6
    natural = client.responses.create(model="m1", input="hello")
    assert natural.status == "completed"


def test_tools_are_called_for_every_tool_choice(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "m1", "messages": HELLO, "tools": [TOOL]}
    choices: Any = ("required", "auto", {"type": "function", "function": {"name": "get_weather"}})
    for choice in choices:
        answer = client.chat.completions.create(**arguments, tool_choice=choice)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather"
        assert "city" in pydantic.TypeAdapter(dict[str, str]).validate_json(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(**arguments, tool_choice="required") as stream:
        final = stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.arguments == call.function.arguments
    plain = client.chat.completions.create(**arguments)
    assert plain.choices[0].message.tool_calls is None
    tools: Any = [{"type": "function", "strict": False, **TOOL["function"]}]
    response = client.responses.create(model="m1", input="hello", tools=tools, tool_choice="required")
    assert [item.type for item in response.output] == ["function_call"]


def test_structured_output_is_parsed_by_the_sdk(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="m1", messages=HELLO, response_format=Recipe)
    recipe = parsed.choices[0].message.parsed
    assert recipe is not None
    assert recipe.steps
    response = client.responses.parse(model="m1", input="hello", text_format=Recipe)
    assert response.output_parsed is not None


def test_embeddings_in_both_encodings_are_the_same_vector(client: openai.OpenAI) -> None:
    packed = client.embeddings.create(model="m1", input=["a", "b"], dimensions=16)
    plain = client.embeddings.create(model="m1", input=["a", "b"], dimensions=16, encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)
    assert packed.data[0].embedding != packed.data[1].embedding
    assert sum(value * value for value in TextGenerator(0, b"a").vector(16)) == pytest.approx(1.0)


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m1", "m2"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="m3", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="m1", messages=[])


def test_a_full_queue_refuses_in_its_style_and_a_disconnect_frees_the_slot() -> None:
    refusals: Any = (("vllm", openai.RateLimitError), ("llamacpp", openai.InternalServerError))
    for style, error in refusals:
        options = ("--slots", "1", "--queue-max", "0", "--decode-base-s", "0.05", "--output-tokens", "10000")
        with engine("--style", style, *options) as url, openai.OpenAI(base_url=url, api_key="k", max_retries=0) as sdk:
            stream = sdk.chat.completions.create(model="sim", messages=HELLO, stream=True)
            next(iter(stream))
            with pytest.raises(error) as refused:
                sdk.chat.completions.create(model="sim", messages=HELLO)
            assert refused.value.code == "queue_full"
            running = "vllm:num_requests_running" if style == "vllm" else "llamacpp:requests_processing"
            assert metric(url, running) == 1
            stream.close()
            answer = sdk.with_options(max_retries=5).chat.completions.create(
                model="sim",
                messages=HELLO,
                max_tokens=1,
            )
            assert answer.choices[0].finish_reason == "length"
            assert metric(url, "fleetgate_engine_client_disconnects_total") == 1


def test_a_key_a_region_and_a_start_up_time() -> None:
    with engine("--api-key", "right", "--region", "eu-west") as url:
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as sdk,
            pytest.raises(openai.AuthenticationError),
        ):
            sdk.completions.create(model="sim", prompt="hi")
        with openai.OpenAI(base_url=url, api_key="right", max_retries=0) as sdk:
            raw = sdk.completions.with_raw_response.create(model="sim", prompt="hi", max_tokens=1)
        assert raw.headers["x-engine-region"] == "eu-west"
    with (
        engine("--startup-s", "600") as url,
        openai.OpenAI(base_url=url, api_key="k", max_retries=0) as sdk,
        pytest.raises(openai.InternalServerError),
    ):
        sdk.completions.create(model="sim", prompt="hi")
