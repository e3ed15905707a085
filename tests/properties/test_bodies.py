"""Bodies: what is read agrees with another parser, and what is rewritten changes nothing else."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.protocols.clients.openai import classify_event, parse_request, rename_model, rewrite
from fleetgate.protocols.json_members import InvalidBody, locate_members

NAMES = st.sampled_from(["m", "meta/llama-3", 'quo"te', "back\\slash", "ünï😀", "model", "a b"])
TEXTS = st.text(max_size=12) | st.sampled_from(['"model":"x"', "\\", "\u2028", '{"model"', "model"])
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "stream", "x", "stream_options"]), inner, max_size=3)
    ),
    max_leaves=8,
)
OTHERS = st.dictionaries(st.sampled_from(["messages", "x", "metadata", "tools", "n"]), VALUES, max_size=4)
OPTIONS = st.none() | st.fixed_dictionaries({}, optional={"include_usage": st.none() | st.booleans(), "more": VALUES})


@st.composite
def bodies(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A request and one of the ways to write it down."""
    body: dict[str, Any] = {**draw(OTHERS), "model": draw(NAMES)}
    if draw(st.booleans()):
        body["stream"] = draw(st.none() | st.booleans())
    if draw(st.booleans()):
        body["stream_options"] = draw(OPTIONS)
    keys = draw(st.permutations(list(body)))
    body = {key: body[key] for key in keys}
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n ")]))
    text = json.dumps(body, separators=separators, ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        text = text.replace('"model"', '"mod\\u0065l"', 1)
    around = draw(st.sampled_from([("", ""), (" ", "\n"), ("\r\n\t", " ")]))
    return body, text.join(around).encode()


@given(bodies())
def test_what_is_read_is_what_was_written(made: tuple[dict[str, Any], bytes]) -> None:
    body, data = made
    info = parse_request(data)
    assert info.model == body["model"] and info.stream == bool(body.get("stream"))
    options = body.get("stream_options")
    assert info.wants_usage == bool(options and options.get("include_usage"))


@given(bodies(), NAMES, st.booleans())
def test_what_is_rewritten_differs_in_model_and_usage_alone(
    made: tuple[dict[str, Any], bytes], name: str, add_usage: bool
) -> None:
    body, data = made
    info = parse_request(data)
    add_usage = add_usage and not info.wants_usage
    written = json.loads(rewrite(data, info, name, add_usage))
    wanted: dict[str, Any] = {**body, "model": name}
    if add_usage:
        wanted["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    assert written == wanted
    if name == info.model and not add_usage:
        assert rewrite(data, info, name, add_usage) is data
    keys = [key for key, _, _ in locate_members(rewrite(data, info, name, add_usage))]
    assert len(keys) == len(set(keys))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_request_or_a_clear_refusal(data: bytes) -> None:
    try:
        parse_request(data)
    except InvalidBody as error:
        assert error.code in ("invalid_json", "invalid_request") and error.message


@given(
    bodies(), st.integers(0, 200), st.sampled_from([b"", b'"', b"}", b",", b"\\", b"\x00", b"\xff", b'"model":"q",'])
)
def test_damaged_bodies_are_read_as_another_parser_reads_them_or_refused(
    made: tuple[dict[str, Any], bytes], at: int, damage: bytes
) -> None:
    data = made[1][:at] + damage + made[1][at + 1 :]
    try:
        info = parse_request(data)
    except InvalidBody:
        return
    members = json.loads(data, object_pairs_hook=list)
    assert [value for key, value in members if key == "model"] == [info.model], "one model, and the same one"


@given(NAMES, NAMES, TEXTS, st.booleans(), st.booleans())
def test_renaming_an_answer_changes_its_model_alone(
    inner: str, asked: str, text: str, ascii_only: bool, model_first: bool
) -> None:
    choices = {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
    answer = {"model": inner, **choices} if model_first else {**choices, "model": inner}
    data = b"data: " + json.dumps(answer, ensure_ascii=ascii_only).encode("utf-8", "replace") + b"\n\n"
    names = [json.dumps(name, ensure_ascii=False).encode() for name in (inner, asked)]
    renamed = rename_model(data, *names)
    before, after = json.loads(data[6:]), json.loads(renamed[6:])
    assert after == {**before, "model": asked}


@given(st.binary(max_size=80), st.sampled_from([b"", b"data: ", b"data: {", b"event: x\ndata: "]))
def test_any_event_means_something(data: bytes, begin: bytes) -> None:
    classify_event(begin + data + b"\n\n")
