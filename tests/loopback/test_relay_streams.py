"""Streams through a worker: byte for byte, moved while nothing was said, loud when broken after that."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_replies import DONE, event, finish, role, stream_of, tokens, usage_event
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane

SECOND_IS_GOOD = {"models": {name: "ok" for name in EVERY_MODEL}}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2) as made:
        yield made


def renamed(payload: bytes, name: str) -> bytes:
    """What a good stream of the second wall looks like to a client that asked for `name`."""
    return payload.replace(b'"model":"ok"', b'"model":"%b"' % name.encode())


def plain(name: str, count: int = 4) -> bytes:
    return b"".join(stream_of(name, count))


def commented(name: str) -> bytes:
    named = b"event: message\nid: 7\n" + tokens(name, 1)[0]
    return b"".join([role(name), named, b": keep-alive\n\n", *tokens(name, 2), finish(name), DONE])


GOOD = {
    **{
        name: plain(name)
        for name in ("ok", "in-pieces", "odd-chunks", "until-close", "at-once", "one-chunk", "with-length", "late-end")
    },
    "crlf": plain("crlf").replace(b"\n\n", b"\r\n\r\n"),
    "comments": commented("comments"),
    "comment-first": b": waiting\n\n" + plain("comment-first", 1),
    "no-done": plain("no-done", 1),
    "no-end": plain("no-end", 1),
    "usage-first": usage_event("usage-first") + plain("usage-first", 1),
}


@pytest.mark.parametrize("name", GOOD)
def test_row_13_a_good_stream_is_relayed_byte_for_byte(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    with two.client() as client:
        for pace_s in (0, 0.005):  # the second time on whatever the first left in the pool
            answer = client.ask(request(name, stream=True, wall={"pace_s": pace_s}))
            assert answer.body == GOOD[name]
            assert answer.status == 200 and answer.whole
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["x-fleetgate-deployment"] == "one"
            assert answer.headers["x-fleetgate-region"] == "region-one"
            assert answer.headers["x-fleetgate-attempts"] == "1"
    assert two.seen(0) == [name, name] and not two.seen(1)
    two.wait_idle()


def test_thousands_of_events_come_whole(two: Plane) -> None:
    two.use()
    for name in ("ok", "in-pieces", "at-once", "odd-chunks"):
        count = 60 if name == "in-pieces" else 3000
        answer = two.ask(request(name, stream=True, wall={"count": count}))
        assert answer.body == plain(name, count) and answer.whole


BEFORE_CONTENT = [
    "rst-before", "fin-before", "role-fin", "role-alone", "empty", "done-alone", "error-first", "full-first",
    "500", "502", "503", "503-full", "504", "529", "429", "401", "403", "404", "302",
    "garbage", "bad-chunk", "huge-head", "switch",
]  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_CONTENT)
def test_rows_10_and_24_before_the_first_content_a_failure_is_invisible(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    answer = two.ask(request(name, stream=True))
    assert answer.status == 200 and answer.whole
    assert answer.body == renamed(plain("ok"), name)
    assert answer.headers["x-fleetgate-deployment"] == "two"
    assert answer.headers["x-fleetgate-region"] == "region-two"
    assert answer.headers["x-fleetgate-attempts"] == "2"
    assert two.seen(0) == [name] and two.seen(1) == ["ok"]
    two.wait_idle()


AFTER_CONTENT = {
    "rst-mid": 2,
    "fin-mid": 2,
    "clean-end": 1,
    "error-mid": 1,
    "done-unfinished": 1,
    "torn-end": 1,
    "huge-event": 1,
    "endless-event": 1,
}


def interrupted(answer: Answer, name: str, count: int) -> None:
    """Content, then one error event, then an end that no client takes for a good one."""
    begin = b"".join([role(name), *tokens(name, count)])
    assert answer.body.startswith(begin), answer.body
    tail = answer.body[len(begin) :]
    assert tail.startswith(b"data: ") and tail.endswith(b"\n\n") and tail.count(b"data: ") == 1
    error = json.loads(tail[6:])["error"]
    assert error["code"] == "upstream_interrupted" and error["message"] and error["type"] == "server_error"
    assert not answer.whole and b"[DONE]" not in answer.body


@pytest.mark.parametrize("name", AFTER_CONTENT)
def test_rows_11_12_14_and_25_after_content_an_interruption_is_loud(two: Plane, name: str) -> None:
    two.use({}, SECOND_IS_GOOD)
    with two.client() as client:
        answer = client.ask(request(name, stream=True))
        assert answer.status == 200
        interrupted(answer, name, AFTER_CONTENT[name])
        assert client.ended
    two.wait_idle()


def test_a_machine_that_falls_in_the_middle_is_loud_too(two: Plane) -> None:
    two.use({})
    two.wall.hold()
    with two.client() as client:
        client.send(request("held", stream=True))
        client.read_until(b"tok")
        two.wall.fall()
        try:
            rest = client.read_until(b"upstream_interrupted")
            assert b"[DONE]" not in rest
            assert not client.closed() or client.ended
        finally:
            two.wall.rise()
            two.wall.release()
    two.wait_idle()


@pytest.mark.parametrize("name", ["malformed", "torn", "torn-marked", "damaged", "unquoted", "two-lines"])
def test_row_23_an_event_that_is_not_json_is_dropped_and_the_rest_is_whole(two: Plane, name: str) -> None:
    """The official SDKs die of such an event with an error that is not theirs."""
    two.use({})
    for pace_s in (0, 0.01):  # read together, and one by one
        answer = two.ask(request(name, stream=True, wall={"pace_s": pace_s}))
        token = tokens(name, 1)[0]
        assert answer.body == b"".join([role(name), token, token, finish(name), DONE]) and answer.whole


@pytest.mark.parametrize("pace_s", [0, 0.01])
def test_row_26_bytes_that_are_not_text_are_replaced(two: Plane, pace_s: float) -> None:
    """Event by event, so that what is well keeps its bytes."""
    two.use({})
    answer = two.ask(request("not-utf8", stream=True, wall={"pace_s": pace_s}))
    assert answer.whole and answer.body.decode().count("\ufffd") == 2
    model, token = "not-utf8", tokens("not-utf8", 1)[0]
    assert answer.body.startswith(role(model) + token) and answer.body.endswith(token + finish(model) + DONE)


def test_a_malformed_first_event_is_dropped(two: Plane) -> None:
    two.use({})
    assert two.ask(request("malformed-first", stream=True)).body == plain("malformed-first", 1)


def test_client_http_10_sees_interruptions_in_the_text(two: Plane) -> None:
    two.use({})
    data = request("rst-mid", stream=True).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = two.ask(data)
    assert b"upstream_interrupted" in answer.body and b"[DONE]" not in answer.body


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "llamacpp", "sglang", "tensorrt-llm"])
def test_usage_is_asked_for_and_hidden(two: Plane, engine: str) -> None:
    two.use({"engine": engine})
    with two.client() as client:
        for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
            answer = client.ask(request("ok", stream=True, **options))
            assert answer.body == plain("ok") and answer.whole
            assert two.wall.seen[-1].ask["stream_options"] == {"include_usage": True}
        kept = client.ask(request("ok", stream=True, stream_options={"continuous_usage_stats": False, "x": [1]}))
        assert kept.body == plain("ok")
        wanted = {"continuous_usage_stats": False, "x": [1], "include_usage": True}
        assert two.wall.seen[-1].ask["stream_options"] == wanted
        asked = client.ask(request("ok", stream=True, stream_options={"include_usage": True}))
        assert asked.body == b"".join(stream_of("ok", usage=True))
        whole = client.ask(request("ok"))
        assert whole.status == 200 and "stream_options" not in two.wall.seen[-1].ask
    totals = two.rig.board.series_totals()
    label = 'deployment="one"'
    assert any("tokens_total" in name and label in name and count for name, count in totals.items())


def test_usage_is_hidden_wherever_it_comes(two: Plane) -> None:
    two.use({"engine": "vllm"})
    assert two.ask(request("usage-first", stream=True)).body == plain("usage-first", 1)


@pytest.mark.parametrize("engine", ["openai", "tgi"])
def test_an_opaque_engine_gets_the_body_as_it_came(two: Plane, engine: str) -> None:
    two.use({"engine": engine})
    choices: list[dict[str, Any]] = [{}, {"stream_options": {"include_usage": True}}, {"stream_options": {}}]
    for options in choices:
        data = request("ok", stream=True, **options)
        answer = two.ask(data)
        assert two.wall.seen[-1].body == data.partition(b"\r\n\r\n")[2]
        assert answer.body == b"".join(stream_of("ok", usage=options.get("stream_options") == {"include_usage": True}))


@pytest.mark.parametrize("pad", ['"n":' + "1" * 5000, '"x":' + "[" * 900 + "]" * 900])
def test_usage_is_added_to_bodies_that_another_parser_would_refuse(two: Plane, pad: str) -> None:
    """Whatever the first look at a body let through must not fail when it is written anew."""
    two.use({"engine": "vllm"})
    body = b'{"model":"ok","stream":true,"stream_options":{},%b}' % pad.encode()
    head = request("ok").partition(b"\r\n\r\n")[0].rpartition(b": ")[0]
    answer = two.ask(head + b": %d\r\n\r\n" % len(body) + body)
    assert answer.status in (200, 400)
    two.wait_idle()


# --- the model's name -------------------------------------------------------------------------------------------------


def test_the_model_is_renamed_both_ways(two: Plane) -> None:
    two.use({"models": {"public": "ok@inner/name", 'pub"lic': 'ok@q"uote', "ünï": "ok@ünï-inner"}})
    for asked, inner in (("public", "ok@inner/name"), ('pub"lic', 'ok@q"uote'), ("ünï", "ok@ünï-inner")):
        for extra in ({}, {"x": "é\u2028"}, {"metadata": {"model": "nested"}}, {"y": '"model": "m"'}):
            data = request(asked, stream=True, **extra)
            answer = two.ask(data)
            assert two.wall.seen[-1].ask == {**json.loads(data.partition(b"\r\n\r\n")[2]), "model": inner}
            events = [json.loads(one[6:]) for one in answer.body.split(b"\n\n")[:-2]]
            assert events and {one["model"] for one in events} == {asked}
            whole = two.ask(request(asked, **extra))
            assert whole.json()["model"] == asked and inner.encode() not in whole.body


@pytest.mark.parametrize("inner", ["dated", "dated@inner"])
def test_clients_read_the_name_they_asked_for_whatever_the_engine_calls_itself(two: Plane, inner: str) -> None:
    two.use({"models": {"dated": inner}})
    events = [json.loads(one[6:]) for one in two.ask(request("dated", stream=True)).body.split(b"\n\n")[:-2]]
    assert len(events) > 4 and {one["model"] for one in events} == {"dated"}
    assert two.ask(request("dated")).json()["model"] == "dated"


def test_renaming_touches_nothing_else(two: Plane) -> None:
    two.use({"models": {"public": "ok"}})
    body = b'{ "a" : 1.50e+3,"model"\t:\n"public" ,"b":[ ],"stream":false, "c":"\xc3\xa9" }'
    head = request("x").partition(b"\r\n\r\n")[0].rpartition(b": ")[0]
    assert two.ask(head + b": %d\r\n\r\n" % len(body) + body).status == 200
    assert two.wall.seen[-1].body == body.replace(b"public", b"ok")


def test_content_that_mentions_the_model_is_left_alone(two: Plane) -> None:
    text = 'it says "model":"ok@a" here'

    two.use({"models": {"public": "echo@a"}})

    async def echo(line, seen) -> None:  # type: ignore[no-untyped-def]
        payload = b"".join([event("echo@a", {"content": text}), finish("echo@a"), DONE])
        line.end()
        line.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(payload) + payload
        )

    two.wall.replies["echo"] = echo
    answer = two.ask(request("public", stream=True))
    assert answer.body == b"".join([event("public", {"content": text}), finish("public"), DONE])
