"""Upstreams and clients that try to get something else than a request or an answer through.

FAULTS.md rows 39, 44 to 46, 90 and 95.
"""

import socket
from collections.abc import Iterator

import pytest

from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import post, request
from tests.loopback.wall_replies import CHUNKED, EVENT_STREAM, chunk, stream_of
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_rig import Plane, plane

MODEL = "hostile"
SERVED = {"models": {MODEL: MODEL, "ok": "ok"}}
TYPE = b"content-type: application/json\r\n"
BODY = answer_of(MODEL)
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)


@pytest.fixture(scope="module")
def one() -> Iterator[Plane]:
    with plane() as made:
        yield made


def behave(edge: Plane, data: bytes) -> None:
    """The first wall answers its model with these bytes."""

    async def reply(line: Line, seen: Seen) -> None:
        line.end()
        line.write(data)

    edge.wall.replies[MODEL] = reply
    edge.use(SERVED)


@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"303 See Other", b"307 Temporary", b"308 Permanent"])
@pytest.mark.parametrize("stream", [False, True])
def test_row_44_redirects_are_never_followed(one: Plane, status: bytes, stream: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        place = b"location: http://127.0.0.1:%d/v1/chat/completions\r\n" % elsewhere.getsockname()[1]
        behave(one, b"HTTP/1.1 " + status + b"\r\n" + place + b"content-length: 0\r\n\r\n")
        answer = one.ask(request(MODEL, stream=stream))
        assert (answer.status, answer.code) == (502, "upstream_error")
        assert "location" not in answer.headers
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):  # the target of the redirect was not dialled
            elsewhere.accept()


def test_row_45_interim_answers_are_dropped(one: Plane) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\nset-cookie: a=b\r\n\r\n"
    behave(one, interim * 3 + b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + BODY)
    with one.client() as client:
        client.send(request(MODEL))
        head = client.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ") and b"link" not in head and b"cookie" not in head


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
def test_row_45_an_upstream_that_switches_protocols_gets_no_tunnel(one: Plane, upgrade: bytes) -> None:
    behave(one, b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: " + upgrade + b"\r\n\r\n\x00\x01secret")
    with one.client() as client:
        answer = client.ask(request(MODEL))
        assert (answer.status, answer.code) == (502, "upstream_error") and b"secret" not in answer.body
        assert client.ask(request("ok")).status in (200, 503), "the client's connection still speaks HTTP"


@pytest.mark.parametrize("stream", [False, True])
def test_row_45_trailers_are_dropped(one: Plane, stream: bool) -> None:
    parts = stream_of(MODEL) if stream else [BODY]
    framed = b"".join(map(chunk, parts)) + b"0\r\nset-cookie: a=b\r\nx-fleetgate-deployment: evil\r\n\r\n"
    first = EVENT_STREAM + CHUNKED if stream else b"HTTP/1.1 200 OK\r\n" + TYPE + b"trailer: set-cookie\r\n" + CHUNKED
    behave(one, first + framed)
    with one.client() as client:
        for _ in range(2):
            answer = client.ask(request(MODEL, stream=stream))
            assert answer.whole and answer.body == b"".join(parts)
            assert answer.headers["x-fleetgate-deployment"] == "one"
            assert not {"trailer", "set-cookie"} & set(answer.headers)


def test_row_95_bodies_where_none_may_be_are_not_passed_on(one: Plane) -> None:
    for status in (b"204 No Content", b"304 Not Modified"):
        for framing in (LENGTH + BODY, CHUNKED + chunk(BODY) + b"0\r\n\r\n"):
            behave(one, b"HTTP/1.1 " + status + b"\r\n" + TYPE + framing)
            with one.client() as client:
                answer = client.ask(request(MODEL))
                assert (answer.status, answer.code) == (502, "upstream_error")
                assert client.ask(request("ok")).status in (200, 503), "and the next answer is its own"


def test_row_95_a_second_answer_is_nobodys(one: Plane) -> None:
    evil = answer_of("evil")
    second = b"HTTP/1.1 200 OK\r\n" + TYPE + b"content-length: %d\r\n\r\n%b" % (len(evil), evil)
    behave(one, b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + BODY + second)
    with one.client() as client:
        for _ in range(3):
            assert client.ask(request(MODEL)).body == BODY
    assert len(one.wall.carriers) == 3, "no connection with bytes behind an answer is used again"


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"GET /v1/realtime HTTP/1.1", 404),
        (b"GET /v1/chat/completions HTTP/1.1", 405),
        (b"GET /v1/models HTTP/1.1", 200),
        (b"CONNECT 127.0.0.1:80 HTTP/1.1", 400),
    ],
)
def test_row_46_a_client_gets_no_tunnel(one: Plane, first: bytes, status: int) -> None:
    one.use(SERVED)
    rows = b"Host: chat.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with one.client() as client:
        answer = client.ask(first + b"\r\n" + rows + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert answer.status == status
        assert "upgrade" not in answer.headers and "sec-websocket-accept" not in answer.headers
        if status != 400:
            assert client.ask(request("ok")).status == 200, "what follows is read as HTTP"


PATHS = [
    "/../etc/passwd", "/v1/../../etc/passwd", "/v1/chat/completions/..", "/v1/%2e%2e/metrics",
    "/%2e%2e/%2e%2e/etc/passwd", "//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions;x=y",
    "/v1/chat/completions/", "/V1/chat/completions", "/v1/chat%2fcompletions", "/v1/chat/completions%00",
    "/v1/chat/completions%0d%0aHost:%20evil", "/v1\\chat\\completions", "/./v1/chat/completions", "/metrics",
    "/healthz", "/api/v1/keys", "/invocations", "/v1/chat/completions#x",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_row_90_only_the_paths_themselves_are_paths(one: Plane, path: str) -> None:
    one.use(SERVED)
    answer = one.ask(post(b'{"model":"ok"}', path=path))
    assert (answer.status, answer.code) == (404, "unknown_path")
    assert not one.wall.seen
