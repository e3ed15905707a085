"""Heads, by example."""

import pytest

from fleetgate.protocols.http1 import Malformed, chunk, parse_request_head, parse_response_head, status_line


def test_a_request_head() -> None:
    head = parse_request_head(
        b"POST /v1/x?a=b HTTP/1.1\r\nHost: Chat.Test:80\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 5\r\n\r\n"
    )
    assert (head.method, head.path, head.query, head.host) == (b"POST", b"/v1/x", b"a=b", b"chat.test:80")
    assert head.headers[b"x-a"] == b"1, 2"
    assert (head.content_length, head.chunked, head.keep_alive, head.http10) == (5, False, True, False)


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1", b"", True),
        (b"1", b"Connection: close\r\n", False),
        (b"1", b"Connection: Keep-Alive, CLOSE\r\n", False),
        (b"0", b"", False),
        (b"0", b"Connection: Keep-Alive\r\n", True),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, kept: bool) -> None:
    head = parse_request_head(b"GET / HTTP/1.%b\r\nHost: a\r\n%b\r\n" % (version, connection))
    assert head.keep_alive is kept


def test_expect_means_nothing_in_http_10() -> None:
    assert not parse_request_head(b"GET / HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\n\r\n").expects_continue


def test_a_response_head() -> None:
    head = parse_response_head(b"HTTP/1.1 200\r\nContent-Length: 7 \r\nServer:\r\n\r\n")
    assert (head.status, head.content_length, head.chunked, head.keep_alive) == (200, 7, False, True)
    assert head.headers[b"server"] == b""


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 99 Low\r\n\r\n",
        b"HTTP/1.1 600 High\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: a\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_bad_response_heads(head: bytes) -> None:
    with pytest.raises(Malformed):
        parse_response_head(head)


def test_status_lines() -> None:
    assert status_line(404) == b"HTTP/1.1 404 Not Found\r\n"
    assert status_line(529) == b"HTTP/1.1 529 Status\r\n"
    assert chunk(b"x" * 31) == b"1f\r\n" + b"x" * 31 + b"\r\n"


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("framing", [b"", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"])
def test_answers_without_a_body_have_none_whatever_they_say(status: bytes, framing: bytes) -> None:
    head = parse_response_head(b"HTTP/1.1 " + status + b"\r\n" + framing + b"\r\n")
    assert (head.content_length, head.chunked) == (0, False)
