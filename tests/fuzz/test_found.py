"""Faults that fuzzing found, each with its input, reduced."""

from collections.abc import Iterator

import msgspec
import pytest

from fleetgate.core.model import Snapshot, decode_snapshot, encode_snapshot
from fleetgate.protocols import json_checks
from fleetgate.protocols.clients.openai import classify_event, parse_request
from fleetgate.protocols.json_members import InvalidBody, locate_members
from fleetgate.protocols.messages import EventMeaning, ResumeMethod
from fleetgate.protocols.resume.prefill import prefill_body
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript
from tests.loopback.rig import deployment, gateway
from tests.loopback.wall_rig import Plane, plane


@pytest.fixture(scope="module")
def edge() -> Iterator[Plane]:
    with plane() as made:
        yield made


@pytest.mark.parametrize(("first", "status"), [(b"OPTIONS *", b"204"), (b"HEAD /nowhere", b"404")])
def test_answers_without_a_body_have_none_when_the_connection_ends_too(
    edge: Plane, first: bytes, status: bytes
) -> None:
    with edge.client() as client:
        client.send(first + b" HTTP/1.1\r\nHost: chat.test\r\nTransfer-Encoding: chunked\r\n\r\n")
        head = client.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status) and b"connection: close" in head
        assert client.closed(), "and nothing follows the head"


SNAPSHOT = encode_snapshot(
    Snapshot(version=1, made_at_s=0.0, gateways=(gateway("one"),), deployments=(deployment("one", 1, 0),))
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"chat"', b'"ch\xbbat"'),
        (b'"version":1', b'"version":1,"x":' + b"[" * 5000),
        (b'"slot":0', b'"slot":-1'),
        (b'"slot":0', b'"slot":4096'),
    ],
)
def test_a_damaged_snapshot_is_refused_by_the_announced_errors(old: bytes, new: bytes) -> None:
    assert old in SNAPSHOT
    with pytest.raises(msgspec.MsgspecError):
        decode_snapshot(SNAPSHOT.replace(old, new, 1))


def nested(levels: int) -> bytes:
    """A body with this depth."""
    return b'{"model":"m","x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


def test_bodies_nest_64_deep_and_no_deeper() -> None:
    assert parse_request(nested(json_checks.DEPTH_MAX)).model == "m"
    with pytest.raises(InvalidBody, match="64 levels"):
        parse_request(nested(json_checks.DEPTH_MAX + 1))


@pytest.mark.parametrize(
    "text", [b'"]]]]"', b'"\\"["', b'"\\\\"', b'"\\\\\\"["', b'"a\\n"', b'""', b'"","["', b'"{[\\u005b\\/"']
)
def test_brackets_inside_of_strings_are_no_depth(text: bytes) -> None:
    inner = b"[" * 62 + text + b"]" * 62
    flat = b",".join([b'[{"a":' + text.partition(b",")[0] + b"}]"] * 40)
    assert parse_request(b'{"model":"m","x":' + inner + b',"y":[' + flat + b"]}").model == "m"
    with pytest.raises(InvalidBody):
        parse_request(b'{"model":"m","x":[[' + inner + b']],"y":[' + flat + b"]}")


def test_a_key_given_twice_keeps_its_places() -> None:
    body = b'{ "a" : [1,{}] , "a":2,"\\u0061" :"x" }'
    assert [(name, body[start:end]) for name, start, end in locate_members(body)] == [
        ("a", b"[1,{}]"), ("a", b"2"), ("a", b'"x"'),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("event", "meaning"),
    [
        (b"data\n\n", EventMeaning.MALFORMED),
        (b"data\ndata: [DONE]\n\n", EventMeaning.MALFORMED),
        (b"data:  [DONE]\n\n", EventMeaning.MALFORMED),
        (b"data: [DONE]\x0b\n\n", EventMeaning.MALFORMED),
        (b"data: [DONE] \n\n", EventMeaning.DONE),
        (b"data:[DONE]\r\n\r\n", EventMeaning.DONE),
    ],
)
def test_only_what_clients_read_as_the_end_is_done(event: bytes, meaning: EventMeaning) -> None:
    assert classify_event(event)[0] is meaning


def event(text: str, index: int = 0, end: bytes = b"\n\n") -> bytes:
    """One event of a completion."""
    choice = {"index": index, "text": text, "finish_reason": None}
    return b"data: " + msgspec.json.encode({"id": "w", "choices": [choice]}) + end


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\r"])
def test_a_transcript_reads_events_with_any_line_ends(end: bytes) -> None:
    transcript = Transcript()
    transcript.keep(event("abc", end=end))
    one = event("def")
    transcript.keep(b"%x\r\n%b\r\n" % (len(one), one))
    assert transcript.runs == [("text", "abcdef")]


def test_another_choice_is_no_continuation() -> None:
    transcript = Transcript()
    transcript.keep(event("abc"))
    with pytest.raises(Mismatch):
        StreamSplicer(transcript, ResumeMethod.REPLAY, "m").take(event("abc", index=1)[6:-2])


@pytest.mark.parametrize(
    "body", [b"{}", b'{"prompt":5}', b'{"prompt":"x","max_tokens":"9"}', b'{"prompt":"x","seed":1e999}']
)
def test_a_request_that_cannot_be_continued_has_no_prefill_body(body: bytes) -> None:
    transcript = Transcript()
    transcript.keep(event("abc"))
    assert prefill_body(body, transcript, "vllm") is None
