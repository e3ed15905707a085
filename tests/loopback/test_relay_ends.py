"""Answers that look well by their framing or their status, and are not; and ends that are good although cut."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.loopback.test_resume import PATIENCE
from tests.loopback.wall import Reply
from tests.loopback.wall_client import post, request
from tests.loopback.wall_replies import CHUNKED, DONE, EVENT_STREAM, LAST, answer, chunk, finish, raw, stream_of
from tests.loopback.wall_rig import Plane, plane

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
NO_STREAM = answer("m")


def whole(body: bytes) -> Reply:
    """A status 200 with this body."""
    return raw(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)


def streams(*events: bytes, last: bytes = LAST, then: str = "") -> Reply:
    """These events, each in its chunk."""
    return raw(EVENT_STREAM + CHUNKED + b"".join(map(chunk, events)) + last, then)


def said(index: int, text: str = "", end: str | None = None) -> bytes:
    """An event of one choice."""
    choice = {"index": index, "delta": {"content": text} if text else {}, "finish_reason": end}
    event = {"id": "w", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def error(code: object) -> bytes:
    """An error as engines in Python write it."""
    return json.dumps({"error": {"message": "no", "code": code, "type": "x"}}).encode()


ONE, TWO = said(0, "a"), said(1, "b")
REPLIES = {
    "n2-cut": streams(ONE, TWO, said(0, end="stop")),
    "n2-cut-done": streams(ONE, TWO, said(0, end="stop"), DONE),
    "n2-well": streams(ONE, TWO, said(0, end="stop"), TWO, said(1, end="stop"), DONE),
    "gave-up": streams(ONE, said(0, end="error"), DONE),
    "aborted": streams(ONE, said(0, end="abort"), DONE),
    "event-error": streams(ONE, b'event: error\ndata: {"message":"no"}\n\n', said(0, end="stop"), DONE),
    "finish-rst": streams(ONE, said(0, end="stop"), last=b"", then="reset"),
    "finish-fin": streams(ONE, said(0, end="stop") + b"data: {", last=b"", then="close"),
    "finish-stall": streams(ONE, said(0, end="stop"), last=b""),
    "finish-error": streams(ONE, said(0, end="stop"), b"data: " + error(500) + b"\n\n"),
    "error-500": whole(error(500)),
    "error-code": whole(error("engine_lost")),
    "no-stream": whole(NO_STREAM),
    "no-length": raw(EVENT_STREAM + b"content-length: 0\r\n\r\n"),
    "large-close": raw(HEAD + b'\r\n{"data":"' + b"x" * (9 << 20), "close"),
    "error-400": whole(error(400)),
    "first-400": streams(b"data: " + error(400) + b"\n\n", DONE),
    "first-name": streams(b'data: {"error":{"message":"no","type":"invalid_request_error"}}\n\n'),
}
LOUD: dict[str, dict[str, Any]] = {
    "n2-cut": {"n": 2},
    "n2-cut-done": {"n": 2},
    "gave-up": {},
    "aborted": {},
    "event-error": {},
    "finish-error": {"temperature": 0},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2, patience=PATIENCE) as made:
        made.wall.replies.update(REPLIES)
        yield made


def use(made: Plane, name: str, **options: object) -> None:
    made.use({"models": {"m": name}, **options}, {"models": {"m": "ok"}})


@pytest.mark.parametrize("name", LOUD)
def test_row_14_what_looks_ended_and_is_not_is_loud(two: Plane, name: str) -> None:
    use(two, name)
    got = two.ask(request("m", stream=True, **LOUD[name]))
    assert got.status == 200 and got.body.startswith(ONE)
    assert b"upstream_interrupted" in got.body and DONE not in got.body and not got.whole
    two.wait_idle()


def test_several_choices_end_when_all_have_ended(two: Plane) -> None:
    use(two, "n2-well")
    got = two.ask(request("m", stream=True, n=2))
    assert got.whole and got.body.endswith(DONE) and got.body.count(TWO) == 2
    listed = {"model": "m", "prompt": ["a", "b"], "stream": True}
    got = two.ask(post(json.dumps(listed).encode(), path="/v1/completions"))
    assert got.whole and got.body.endswith(DONE)


@pytest.mark.parametrize("name", ["finish-rst", "finish-fin", "finish-stall"])
def test_row_13_a_cut_behind_the_finish_takes_nothing_away(two: Plane, name: str) -> None:
    """Neither an error nor a second Deployment, which would go on with what had ended."""
    use(two, name)
    got = two.ask(request("m", stream=True, temperature=0))
    assert got.body == ONE + said(0, end="stop") + DONE and got.whole
    assert not two.seen(1)
    two.wait_idle()


@pytest.mark.parametrize("name", ["error-500", "error-code", "no-stream", "no-length", "large-close"])
def test_rows_15_and_24_what_is_no_answer_moves_whatever_its_status(two: Plane, name: str) -> None:
    use(two, name)
    stream = name.startswith("no-")
    got = two.ask(request("m", stream=stream))
    assert got.status == 200 and got.whole and got.headers["x-fleetgate-deployment"] == "two"
    assert got.body == (b"".join(stream_of("ok")).replace(b'"ok"', b'"m"') if stream else NO_STREAM)
    two.wait_idle()


@pytest.mark.parametrize("name", ["error-400", "first-400", "first-name"])
def test_rows_22_and_24_the_clients_mistake_is_told_behind_a_status_200_too(two: Plane, name: str) -> None:
    """It is not tried elsewhere, and no number of such requests takes the engine out."""
    use(two, name)
    for _ in range(12):
        got = two.ask(request("m", stream=name.startswith("first")))
        assert got.status == 400 and got.json()["error"]["message"] == "no"
        assert got.headers["content-type"] == "application/json" and got.headers["x-fleetgate-attempts"] == "1"
    assert not two.seen(1)


WAITS = {"Mon, 01 Jan 2024 00:00:09 GMT": 9, "4.5": 4, "1000000": 60, "soon": 1, "Mon, 01 Jan 2024 00:00:00 GMT": 1}


@pytest.mark.parametrize("value", WAITS)
def test_row_16_retry_after_in_every_form(two: Plane, value: str) -> None:
    """A date is read by the clock of the engine that wrote it."""
    date = b"date: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
    head = b"HTTP/1.1 429 Too Many Requests\r\n" + date + b"retry-after: %b\r\ncontent-length: 2\r\n\r\n{}"
    two.wall.replies["later"] = raw(head % value.encode())
    two.use({"models": {"m": "later"}})
    got = two.ask(request("m"))
    assert got.status == 429 and got.headers["retry-after"] == str(WAITS[value])


def test_the_end_of_another_api_is_no_choice(two: Plane) -> None:
    """A stream of `/v1/responses` has neither choices nor `[DONE]`."""
    delta = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
    end = b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"r"}}\n\n'
    asked = json.dumps({"model": "m", "input": "hi", "stream": True}).encode()
    for reply, good in ((streams(delta, end, last=b"", then="reset"), True), (streams(delta), False)):
        two.wall.replies["responses"] = reply
        use(two, "responses")
        got = two.ask(post(asked, path="/v1/responses"))
        assert got.whole is good and (b"upstream_interrupted" in got.body) is not good
        assert finish("m") not in got.body
