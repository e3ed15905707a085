"""Generated text and values of the simulated engine, and the parsers of its requests."""

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.engine.json_schema import Schema, generate_value
from fleetgate.engine.request_parser import (
    InvalidRequest,
    OutputDefaults,
    read_chat,
    read_completion,
    read_embedding,
    read_response,
)
from fleetgate.engine.text_generator import TextGenerator

SIMPLE = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-50, 50),
        st.integers(0, 9),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": ["null", "number"]}),
    st.builds(lambda values: {"enum": values}, st.lists(st.text(), min_size=1)),
    st.builds(lambda length: {"type": "string", "minLength": length}, st.integers(0, 60)),
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects, lists and choices of simpler schemas."""
    properties = st.dictionaries(st.text(max_size=6), inner, max_size=4)
    return st.one_of(
        st.builds(
            lambda p: {"type": "object", "properties": p, "required": sorted(p), "additionalProperties": False},
            properties,
        ),
        st.builds(lambda items, least: {"type": "array", "items": items, "minItems": least}, inner, st.integers(0, 3)),
        st.builds(lambda first, other: {"anyOf": [first, other]}, inner, inner),
    )


@given(st.recursive(SIMPLE, nested, max_leaves=12), st.binary())
def test_a_value_matches_its_schema(schema: dict[str, Any], prompt: bytes) -> None:
    value = generate_value(msgspec.convert(schema, Schema), TextGenerator(0, prompt))
    jsonschema_rs.validate(schema, json.loads(json.dumps(value)))


def test_an_infinitely_recursive_schema_still_gets_a_value() -> None:
    names = [f"f{index}" for index in range(20)]
    schema = {"type": "object", "properties": {name: {"$ref": "#"} for name in names}, "required": names}
    assert generate_value(msgspec.convert(schema, Schema), TextGenerator(0, b"x"))


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(1, 100))
def test_the_same_prompt_gets_the_same_words(prompt: bytes, seed: int, tokens: int) -> None:
    pieces = TextGenerator(seed, prompt).pieces(tokens)
    assert len(pieces) == tokens
    assert pieces == TextGenerator(seed, prompt).pieces(tokens + 7)[:tokens]


@given(st.lists(st.binary(max_size=40), min_size=20, max_size=20, unique=True))
def test_different_prompts_get_different_responses(prompts: list[bytes]) -> None:
    assert len({"".join(TextGenerator(0, prompt).pieces(12)) for prompt in prompts}) == 20


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "model",
                            "messages",
                            "prompt",
                            "input",
                            "tools",
                            "tool_choice",
                            "max_tokens",
                            "role",
                            "content",
                            "type",
                        ]
                    ),
                    inner,
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_any_body_is_a_request_or_a_clear_refusal(body: bytes) -> None:
    for read in (read_chat, read_completion, read_response):
        try:
            request = read(body, OutputDefaults(output_tokens=3))
        except InvalidRequest as error:
            assert str(error)
        else:
            assert request.pieces
            assert request.prompt_tokens > 0
    try:
        assert read_embedding(body).inputs
    except InvalidRequest as error:
        assert str(error)


@pytest.mark.parametrize(
    ("fields", "tokens", "finish_reason"),
    [
        ({}, 5, "stop"),
        ({"max_tokens": 5}, 5, "stop"),
        ({"max_tokens": 4}, 4, "length"),
        ({"max_completion_tokens": 2, "max_tokens": 9}, 2, "length"),
        ({"max_tokens": 9, "ignore_eos": True}, 9, "length"),
        ({"max_tokens": 9, "min_tokens": 7}, 7, "stop"),
    ],
)
def test_length_follows_the_limits(fields: dict[str, object], tokens: int, finish_reason: str) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    request = read_chat(body, OutputDefaults(output_tokens=5))
    assert (len(request.pieces), request.finish_reason) == (tokens, finish_reason)
