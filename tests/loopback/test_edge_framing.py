"""Bad framing at the edge: the right 4xx, the connection closed, and nothing reaches an upstream.

Every attack is followed on the same connection by a good request. A parser that loses its place would serve it: the
wall's request count is the oracle, not the answer.
"""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.loopback.wall_client import PATH, Client, post, request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

BODY = b'{"model":"ok","messages":[]}'
LENGTH = b"Content-Length: %d" % len(BODY)
FIRST = f"POST {PATH} HTTP/1.1".encode()
HOST = b"Host: chat.test"
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKED_BODY = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def edge() -> Iterator[Plane]:
    with plane() as made:
        yield made


def lines(*rows: bytes, body: bytes = b"", first: bytes = FIRST, host: bytes | None = HOST) -> bytes:
    """A head of these lines, then a body."""
    return b"\r\n".join([first, *([host] if host is not None else []), *rows, b"", b""]) + body


def length_is(value: bytes) -> bytes:
    return lines(b"Content-Length:" + value, body=BODY)


def coding_is(value: bytes) -> bytes:
    return lines(b"Transfer-Encoding:" + value, body=CHUNKED_BODY)


def chunks_are(body: bytes) -> bytes:
    return lines(CHUNKED, body=body)


def first_is(first: bytes, host: bytes | None = HOST) -> bytes:
    return lines(LENGTH, body=BODY, first=first, host=host)


def host_is(host: bytes) -> bytes:
    return lines(LENGTH, body=BODY, host=host)


SIZE = b"%x" % len(BODY)

BAD: dict[str, bytes] = {
    # the two lengths of a body
    "length and chunked": lines(LENGTH, CHUNKED, body=CHUNKED_BODY),
    "chunked and length": lines(CHUNKED, LENGTH, body=CHUNKED_BODY),
    "chunked and length 0": lines(CHUNKED, b"Content-Length: 0", body=CHUNKED_BODY),
    "two lengths": lines(LENGTH, b"Content-Length: 5", body=BODY),
    "two equal lengths": lines(LENGTH, LENGTH, body=BODY),
    "lengths in a list": length_is(b" %d, %d" % (len(BODY), len(BODY))),
    "length with plus": length_is(b" +%d" % len(BODY)),
    "length with minus": length_is(b" -%d" % len(BODY)),
    "minus zero": length_is(b" -0"),
    "length in hex": length_is(b" 0x1c"),
    "length in octal": length_is(b" 0o34"),
    "length with underscore": length_is(b" 2_8"),
    "length with decimals": length_is(b" 28.0"),
    "length with exponent": length_is(b" 28e0"),
    "length with inner space": length_is(b" 2 8"),
    "length empty": length_is(b""),
    "length is a word": length_is(b" many"),
    "length past 64 bits": length_is(b" 18446744073709551644"),
    "length of 400 digits": length_is(b" " + b"0" * 390 + b"28"),
    "length in quotes": length_is(b' "28"'),
    "length in other digits": length_is(" ٢٨".encode()),
    "length with a trailing semicolon": length_is(b" 28;"),
    "two codings": lines(CHUNKED, CHUNKED, body=CHUNKED_BODY),
    "coding twice in a list": coding_is(b" chunked, chunked"),
    "gzip and chunked": coding_is(b" gzip, chunked"),
    "chunked and identity": coding_is(b" chunked, identity"),
    "identity": coding_is(b" identity"),
    "identity and a second chunked": lines(b"Transfer-Encoding: identity", CHUNKED, body=CHUNKED_BODY),
    "gzip": coding_is(b" gzip"),
    "xchunked": coding_is(b" xchunked"),
    "chunkedx": coding_is(b" chunkedx"),
    "quoted chunked": coding_is(b' "chunked"'),
    "chunked with parameter": coding_is(b" chunked;q=1"),
    "chunked behind a comma": coding_is(b" ,chunked"),
    "chunked with vertical tab": coding_is(b" \x0bchunked"),
    "chunked with form feed": coding_is(b" chunked\x0c"),
    "chunked with NUL": coding_is(b" chunked\x00"),
    "coding empty": coding_is(b""),
    "coding name with a space": lines(b"Transfer-Encoding : chunked", body=CHUNKED_BODY),
    "coding name with a tab": lines(b"Transfer-Encoding\t: chunked", body=CHUNKED_BODY),
    "coding name with a leading space": lines(LENGTH, b" Transfer-Encoding: chunked", body=CHUNKED_BODY),
    "coding folded": lines(b"Transfer-Encoding:\r\n chunked", body=CHUNKED_BODY),
    "chunked in HTTP/1.0": lines(CHUNKED, body=CHUNKED_BODY, first=FIRST[:-1] + b"0"),
    # lines
    "folded header": lines(b"X-A: b\r\n c", LENGTH, body=BODY),
    "folded with a tab": lines(b"X-A: b\r\n\tc", LENGTH, body=BODY),
    "first header folded": lines(LENGTH, first=FIRST + b"\r\n X-A: b", body=BODY),
    "bare LF everywhere": lines(LENGTH).replace(b"\r\n", b"\n") + BODY + b"\r\n\r\n",
    "bare LF in one line": lines(b"X-A: b\nX-B: c", LENGTH, body=BODY),
    "bare LF after the first line": FIRST + b"\n" + HOST + b"\r\n" + LENGTH + b"\r\n\r\n" + BODY,
    "bare CR in a value": lines(b"X-A: b\rX-B: c", LENGTH, body=BODY),
    "CR CR LF": lines(b"X-A: b\r", LENGTH, body=BODY),
    "bare CR before a coding": lines(LENGTH, b"X-A: b\rTransfer-Encoding: chunked", body=BODY),
    "NUL in a value": lines(b"X-A: b\x00c", LENGTH, body=BODY),
    "NUL in a name": lines(b"X-\x00A: b", LENGTH, body=BODY),
    "bell in a value": lines(b"X-A: \x07", LENGTH, body=BODY),
    "DEL in a value": lines(b"X-A: \x7f", LENGTH, body=BODY),
    "no colon": lines(b"X-A", LENGTH, body=BODY),
    "empty name": lines(b": b", LENGTH, body=BODY),
    "space in a name": lines(b"X A: b", LENGTH, body=BODY),
    "space before the colon": lines(b"Content-Length : %d" % len(BODY), body=BODY),
    "high byte in a name": lines("X-Ä: b".encode(), LENGTH, body=BODY),
    "name in parentheses": lines(b"X(A): b", LENGTH, body=BODY),
    "name in quotes": lines(b'"X-A": b', LENGTH, body=BODY),
    # the first line
    "lower-case method": first_is(b"post " + PATH.encode() + b" HTTP/1.1"),
    "method with a digit": first_is(b"P0ST " + PATH.encode() + b" HTTP/1.1"),
    "no method": first_is(b" " + PATH.encode() + b" HTTP/1.1"),
    "leading space": first_is(b" " + FIRST),
    "two spaces": first_is(FIRST.replace(b" ", b"  ", 1)),
    "tab for a space": first_is(FIRST.replace(b" ", b"\t")),
    "trailing space": first_is(FIRST + b" "),
    "space in the target": first_is(b"POST /v1/chat completions HTTP/1.1"),
    "no target": first_is(b"POST HTTP/1.1"),
    "absolute target": first_is(b"POST http://chat.test" + PATH.encode() + b" HTTP/1.1"),
    "target without a slash": first_is(b"POST v1/chat/completions HTTP/1.1"),
    "star as target": first_is(b"POST * HTTP/1.1"),
    "high byte in the target": first_is("POST /v1/ä HTTP/1.1".encode()),
    "NUL in the target": first_is(b"POST /v1/\x00 HTTP/1.1"),
    "CONNECT": first_is(b"CONNECT chat.test:443 HTTP/1.1"),
    "HTTP/2.0": first_is(FIRST[:-3] + b"2.0"),
    "HTTP/3": first_is(FIRST[:-3] + b"3"),
    "HTTP/0.9": first_is(FIRST[:-3] + b"0.9"),
    "HTTP/1.2": first_is(FIRST[:-3] + b"1.2"),
    "HTTP/1.10": first_is(FIRST + b"0"),
    "HTTP/01.1": first_is(FIRST.replace(b"HTTP/", b"HTTP/0")),
    "http in lower case": first_is(FIRST.replace(b"HTTP", b"http")),
    "HTTPS/1.1": first_is(FIRST.replace(b"HTTP", b"HTTPS")),
    "no version": first_is(b"POST " + PATH.encode()),
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    # Host
    "no Host": first_is(FIRST, host=None),
    "two Hosts": lines(HOST, LENGTH, body=BODY),
    "two different Hosts": lines(b"Host: evil.test", LENGTH, body=BODY),
    "empty Host": host_is(b"Host:"),
    "Host with a path": host_is(b"Host: chat.test/x"),
    "Host with user": host_is(b"Host: a@chat.test"),
    "Host with a space": host_is(b"Host: chat test"),
    "Host in a list": host_is(b"Host: chat.test, evil.test"),
    "Host with a bad port": host_is(b"Host: chat.test:80x"),
    "Host with an empty port": host_is(b"Host: chat.test:"),
    "Host with two ports": host_is(b"Host: chat.test:80:80"),
    "Host with an open bracket": host_is(b"Host: [::1"),
    "Host with a high byte": host_is("Host: chät.test".encode()),
    "Host with a percent": host_is(b"Host: chat%2etest"),
    # chunks
    "chunk size empty": chunks_are(b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size in words": chunks_are(b"xyz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with 0x": chunks_are(b"0x" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with plus": chunks_are(b"+" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with minus": chunks_are(b"-" + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with underscore": chunks_are(b"1_c\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with leading space": chunks_are(b" " + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with trailing space": chunks_are(SIZE + b" \r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size past 64 bits": chunks_are(b"1" + b"0" * 16 + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size of 5000 zeros": chunks_are(b"0" * 5000 + SIZE + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size ends in LF": chunks_are(SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk size ends in CR": chunks_are(SIZE + b"\r" + BODY + b"\r\n0\r\n\r\n"),
    "chunk extension with NUL": chunks_are(SIZE + b";a=\x00\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk extension with LF": chunks_are(SIZE + b";a\n" + BODY + b"\r\n0\r\n\r\n"),
    "endless chunk extension": chunks_are(SIZE + b";" + b"a" * 20_000),
    "chunk longer than said": chunks_are(b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk shorter than said": chunks_are(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY) + 1, BODY)),
    "chunk data ends in LF": chunks_are(SIZE + b"\r\n" + BODY + b"\n0\r\n\r\n"),
    "chunk data without an end": chunks_are(SIZE + b"\r\n" + BODY + b"0\r\n\r\n"),
    "last chunk ends in LF": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\n\r\n\r\n"),
    "bad trailer": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\r\nno colon\r\n\r\n"),
    "folded trailer": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx-a: b\r\n c\r\n\r\n"),
    "trailer with NUL": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx-a: \x00\r\n\r\n"),
    "trailer with bare LF": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx-a: b\nx-b: c\r\n\r\n"),
    "expects something else": lines(b"Expect: 200-ok", LENGTH, body=BODY),
}
STATUSES = {name: {400} for name in BAD}
STATUSES.update({name: {505} for name in ("HTTP/2.0", "HTTP/3", "HTTP/0.9", "preface of HTTP/2")})
STATUSES.update({name: {400, 505} for name in ("HTTP/1.2", "HTTP/1.10", "HTTP/01.1")})
STATUSES["expects something else"] = {417}

TOO_MUCH: dict[str, tuple[bytes, int]] = {
    "65 headers": (lines(*(b"X-%d: y" % n for n in range(63)), LENGTH, body=BODY), 431),
    "one long header": (lines(b"X-A: " + b"a" * 33_000, LENGTH, body=BODY), 431),
    "many middling headers": (lines(*(b"X-%d: %b" % (n, b"y" * 1000) for n in range(40)), LENGTH, body=BODY), 431),
    "long target": (first_is(b"POST /" + b"a" * 33_000 + b" HTTP/1.1"), 431),
    "a head without end": (FIRST + b"\r\n" + b"X-A: " + b"a" * 40_000, 431),
    "a first line without end": (b"A" * 40_000, 431),
    "a length over 20 MiB": (lines(b"Content-Length: %d" % (20 * MIB + 1), body=BODY), 413),
    "a length of 15 digits": (lines(b"Content-Length: 999999999999999", body=BODY), 413),
    "trailers over 8 KiB": (
        chunks_are(b"0\r\n" + b"".join(b"x-%d: %b\r\n" % (n, b"y" * 100) for n in range(100)) + b"\r\n"),
        431,
    ),
    "one-byte chunks without end": (chunks_are(b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n"), 400),
    "one-byte chunks after a large one": (
        chunks_are(b"100000\r\n" + b" " * MIB + b"\r\n" + b"1;x\r\na\r\n" * 100_000 + b"0\r\n\r\n"),
        400,
    ),
    "one trailer without end": (chunks_are(b"0\r\nx-a: " + b"y" * 20_000), 400),
}


def refused(edge: Plane, attack: bytes, statuses: set[int]) -> None:
    """On a connection that has just served a good request: one refusal, then the end, and the wall saw one request."""
    before = len(edge.wall.seen)
    with edge.client() as client:
        assert client.ask(request("ok")).status == 200
        client.send(attack + request("ok"))
        answer = client.read()
        assert answer.status in statuses, answer.body
        assert answer.headers.get("connection") == "close"
        assert answer.headers["x-request-id"]
        assert answer.code == "invalid_request"
        assert answer.json()["error"]["type"] == ("invalid_request_error" if answer.status < 500 else "server_error")
        assert client.closed(), "nothing more is said, and the connection ends"
    assert len(edge.wall.seen) == before + 1, "the attack reached the upstream"


@pytest.mark.parametrize("name", BAD)
def test_bad_framing_is_refused_and_reaches_nobody(edge: Plane, name: str) -> None:
    refused(edge, BAD[name], STATUSES[name])


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_and_reaches_nobody(edge: Plane, name: str) -> None:
    attack, status = TOO_MUCH[name]
    refused(edge, attack, {status})


@pytest.mark.parametrize("name", ["bare LF in one line", "two lengths", "chunk size in words", "no Host", "HTTP/2.0"])
def test_the_same_on_a_new_connection_and_byte_by_byte(edge: Plane, name: str) -> None:
    before = len(edge.wall.seen)
    with edge.client() as client:
        for at in range(len(BAD[name])):
            client.send(BAD[name][at : at + 1])
        assert client.read().status in STATUSES[name]
        assert client.closed()
    assert len(edge.wall.seen) == before


def test_a_body_over_20_mib_in_chunks_is_refused_before_it_is_read(edge: Plane) -> None:
    before = len(edge.wall.seen)
    piece = b"100000\r\n" + b" " * MIB + b"\r\n"
    with edge.client() as client:
        client.send(lines(CHUNKED))
        for _ in range(30):
            client.send(piece)
        answer = client.read()
        assert answer.status == 413
        assert client.closed()
    assert len(edge.wall.seen) == before


def test_413_by_expect_never_asks_for_the_body(edge: Plane) -> None:
    with edge.client() as client:
        client.send(lines(b"Expect: 100-continue", b"Content-Length: 1000000000"))
        answer = client.read_until(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")


def test_20_mib_exactly_pass(edge: Plane) -> None:
    body = b'{"model":"ok","pad":"%b"}'
    body %= b"a" * (20 * MIB - len(body) + 2)
    assert len(body) == 20 * MIB
    answer = edge.ask(post(body))
    assert answer.status == 200
    assert edge.wall.seen[-1].body == body


def test_what_is_odd_but_legal_passes(edge: Plane) -> None:
    odd = {
        "tab before the value": lines(b"Content-Length:\t%d" % len(BODY), body=BODY),
        "no space before the value": lines(b"Content-Length:%d" % len(BODY), body=BODY),
        "spaces after the value": lines(b"Content-Length: %d  " % len(BODY), body=BODY),
        "leading zeros": lines(b"Content-Length: 000%d" % len(BODY), body=BODY),
        "chunked in capitals": lines(b"TRANSFER-ENCODING: CHUNKED", body=CHUNKED_BODY),
        "chunk size in capitals": chunks_are(b"0001C\r\n" + BODY + b"\r\n0\r\n\r\n"),
        "chunk extensions": chunks_are(SIZE + b';a=b;c="d"\r\n' + BODY + b"\r\n0;x\r\n\r\n"),
        "trailers": chunks_are(SIZE + b"\r\n" + BODY + b"\r\n0\r\nx-a: b\r\nx-c: d\r\n\r\n"),
        "one byte a chunk": chunks_are(b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"),
        "an extra line before": b"\r\n\r\n" + lines(LENGTH, body=BODY),
        "Host in capitals": host_is(b"HOST: CHAT.TEST"),
        "Host with a port": host_is(b"Host: chat.test:8080"),
        "Host with a final dot": host_is(b"Host: chat.test."),
        "high bytes in a value": lines(b"X-A: \xc3\xa4", LENGTH, body=BODY),
        "empty value": lines(b"X-A:", LENGTH, body=BODY),
        "a query": first_is(b"POST " + PATH.encode() + b"?api-version=1 HTTP/1.1"),
        "upgrade is ignored": lines(b"Connection: upgrade", b"Upgrade: h2c", LENGTH, body=BODY),
        "64 headers": lines(*(b"X-%d: y" % n for n in range(62)), LENGTH, body=BODY),
    }
    for name, data in odd.items():
        with edge.client() as client:
            answer = client.ask(data)
            assert answer.status == 200, (name, answer.body)
            assert edge.wall.seen[-1].body == BODY, name
            assert client.ask(request("ok")).status == 200, f"{name}: the connection goes on"


def test_lines_with_nothing_in_them_hold_up_nobody(edge: Plane) -> None:
    """Each read of them once cost seconds of the loop's time."""
    with edge.client() as flood, edge.client() as other:
        sending = threading.Thread(target=flood.send, args=(b"\r\n" * 2_000_000 + request("ok"),))
        sending.start()
        began_s = time.monotonic()
        assert flood.read().status == 200
        assert [other.ask(request("ok")).status for _ in range(10)] == [200] * 10
        assert time.monotonic() - began_s < 5
        sending.join(30)


def test_early_refusal_with_an_unread_body_closes(edge: Plane) -> None:
    """FAULTS.md row 31: the unread rest of a body is never taken for a request."""
    before = len(edge.wall.seen)
    for head in (
        lines(b"Content-Length: 5000", host=b"Host: nobody.test"),
        lines(b"Content-Length: 5000", first=b"POST /v1/nothing HTTP/1.1"),
        lines(CHUNKED, first=b"POST /v1/nothing HTTP/1.1"),
        lines(b"Content-Length: 5000", first=b"DELETE " + PATH.encode() + b" HTTP/1.1"),
    ):
        with edge.client() as client:
            answer = client.ask(head + request("ok"))
            assert answer.status in (404, 405)
            assert answer.headers["connection"] == "close"
            assert client.closed()
    assert len(edge.wall.seen) == before


def test_framing_is_written_anew(edge: Plane) -> None:
    """The upstream gets a Content-Length and never the client's framing."""
    edge.ask(lines(CHUNKED, b"Trailer: x-a", b"TE: trailers", body=CHUNKED_BODY))
    headers = edge.wall.seen[-1].headers
    assert headers["content-length"] == [str(len(BODY))]
    assert not {"transfer-encoding", "trailer", "te", "connection", "expect"} & set(headers)


def test_a_client_that_stops_in_the_middle_leaves_nothing(edge: Plane) -> None:
    before = len(edge.wall.seen)
    whole = request("ok")
    for cut in range(1, len(whole), 9):
        client = Client(edge.port)
        client.send(whole[:cut])
        client.socket.close()
    wait_for(lambda: edge.in_flight() == 0)
    assert edge.ask(request("ok")).status == 200
    assert len(edge.wall.seen) == before + 1
