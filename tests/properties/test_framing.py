"""Framing: the outcome does not depend on how bytes are cut, and a kept head never differs from a parsed one."""

import re

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.protocols.http1 import (
    ChunkedBody,
    HeadMemo,
    Malformed,
    ResponseMemo,
    parse_request_head,
    parse_response_head,
)
from fleetgate.protocols.sse import Events

CUTS = st.lists(st.integers(0, 400), max_size=12)
EXTENSIONS = st.sampled_from([b"", b";a", b" ;a=b", b';a="b c"'])
TRAILERS = st.sampled_from([b"", b"x-a: b\r\n", b"x-a:\r\nx-b: c\r\n"])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data cut at these places, empty pieces included."""
    places = sorted(min(cut, len(data)) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def unchunk(parts: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    """Payload, whether it ended, and the bytes after it; None for bad framing."""
    body, payload, rest = ChunkedBody(), b"", b""
    try:
        for part in parts:
            if body.done:
                rest += part
            else:
                payload += body.feed(part)
    except Malformed:
        return None
    return payload, body.done, body.rest + rest


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), EXTENSIONS)), TRAILERS, st.binary(max_size=20), CUTS)
def test_a_chunked_body_is_its_payload_however_it_is_cut(
    chunks: list[tuple[bytes, bytes]], trailers: bytes, behind: bytes, cuts: list[int]
) -> None:
    framed = b"".join(b"%X%b\r\n%b\r\n" % (len(data), extension, data) for data, extension in chunks)
    whole = framed + b"0\r\n" + trailers + b"\r\n" + behind
    assert unchunk(pieces(whole, cuts)) == (b"".join(data for data, _ in chunks), True, behind)


@given(st.lists(st.sampled_from([b"0", b"1", b"a", b"\r", b"\n", b"\r\n", b";", b" ", b"x: y", b"-"])), CUTS)
def test_bad_chunks_are_bad_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    whole, cut = unchunk([data]), unchunk(pieces(data, cuts))
    # What is whole must agree; a prefix that is not whole may be refused a little earlier or later.
    if whole is not None and whole[1]:
        assert cut == whole
    if cut is not None and cut[1]:
        assert whole == cut


@given(st.lists(st.sampled_from([b"data: ", b"a", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r", b"\n\r\n", b":"])), CUTS)
def test_events_are_the_same_however_they_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    at_once, piecewise = Events(), Events()
    events = at_once.feed(data)
    assert [event for piece in pieces(data, cuts) for event in piecewise.feed(piece)] == events
    assert piecewise.partial == at_once.partial
    assert b"".join(events) + at_once.partial == data, "no byte is lost"


NAMES = st.sampled_from([b"X-A", b"Accept", b"Authorization", b"X-Length", b"content-lengthy", b"Cookie"])
VALUES = st.sampled_from([b"", b"b", b"Bearer k", b"Content-Length: 5", b"5", b"a, b"])
LENGTHS = st.sampled_from(
    [b"Content-Length: 5", b"Content-Length: 77", b"content-length: 5", b"Content-Length:5", b"CONTENT-LENGTH: 5",
     b"Transfer-Encoding: chunked", b"Content-Length: 0005", b"X-None: 1"]
)  # fmt: skip


@st.composite
def request_heads(draw: st.DrawFn) -> bytes:
    """Heads as clients send them, and with the usual tricks."""
    rows = draw(st.lists(st.builds(lambda n, v: n + b": " + v, NAMES, VALUES), max_size=3))
    rows.insert(draw(st.integers(0, len(rows))), draw(LENGTHS))
    rows.insert(draw(st.integers(0, len(rows))), draw(st.sampled_from([b"Host: a", b"Host: b", b"Host: a\r\nHost: a"])))
    path = draw(st.sampled_from([b"/v1/chat/completions", b"/v1/models", b"/5"]))
    return b"\r\n".join([b"POST " + path + b" HTTP/1.1", *rows, b"", b""])


NEW = st.sampled_from([b"", b"5", b"12", b"0", b"-1", b" 5", b"\r\n", b"\r\nContent-Length: 9", b"x", b"9" * 20])


BODIES = st.sampled_from([b"", b"5", b"{}", b"\r\n", b"\r\n\r\n"])


@st.composite
def twins(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A head and a similar one: another length, or some bytes changed, removed or added."""
    head = draw(request_heads())
    at, size = draw(st.integers(0, len(head))), draw(st.integers(0, 3))
    new = draw(
        st.sampled_from([b"", b"5", b"12", b"0", b"-1", b" 5", b"\r\n", b"\r\nContent-Length: 9", b"x", b"9" * 20])
    )
    changed = head[:at] + new + head[at + size :]
    digits = head.replace(b": 5\r\n", b": %d\r\n" % draw(st.integers(0, 10**9)))
    return head, draw(st.sampled_from([head, changed, digits]))


@given(twins(), BODIES)
def test_a_head_known_again_is_what_parsing_would_say(pair: tuple[bytes, bytes], body: bytes) -> None:
    first, second = pair
    try:
        parsed = parse_request_head(first)
    except Malformed:
        assume(False)
    memo = HeadMemo()
    kept = memo.keep(first)
    if kept:
        assert memo.recall(first + body) == (len(first), parsed.content_length)
    end, length = memo.recall(second + body)
    if end:
        assert kept
        again = parse_request_head((second + body)[:end])
        assert again == msgspec.structs.replace(
            parsed,
            content_length=length,
            headers={**parsed.headers, b"content-length": again.headers[b"content-length"]},
        )


DATE_ROW = re.compile(rb"(Date: )[^\r]*")
DATES = st.sampled_from([b"Mon, 01 Jan 2024 00:00:00 GMT", b"Tue, 02 Jan 2024 00:00:00 GMT"])


@st.composite
def response_twins(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A response head and a similar one."""
    rows = [b"Date: " + draw(DATES), draw(LENGTHS)]
    rows += draw(st.lists(st.builds(lambda n, v: n + b": " + v, NAMES, VALUES), max_size=2))
    rows = draw(st.permutations(rows))
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *rows, b"", b""])
    at, size = draw(st.integers(0, len(head))), draw(st.integers(0, 3))
    new = draw(st.sampled_from([b"", b"7", b"\r\n", b"\r\nContent-Length: 9", b"-", b"4" * 20, b"Transfer-Encoding"]))
    changed = head[:at] + new + head[at + size :]
    dated = head.replace(b"01 Jan", b"09 Feb").replace(b": 5\r\n", b": %d\r\n" % draw(st.integers(0, 10**9)))
    trick = draw(st.sampled_from([b"a\r\nContent-Length: 3\r\nX-A: b", b"a\nTransfer-Encoding: chunked"]))
    tricked = DATE_ROW.sub(lambda match: match[1] + trick.ljust(29, b"x")[:29], head, count=1)
    return head, draw(st.sampled_from([head, changed, dated, tricked]))


@given(response_twins(), BODIES)
def test_an_answers_head_known_again_is_what_parsing_would_say(pair: tuple[bytes, bytes], body: bytes) -> None:
    first, second = pair
    try:
        parsed = parse_response_head(first)
    except Malformed:
        assume(False)
    memo = ResponseMemo()
    memo.keep(first, parsed)
    recalled = memo.recall(second + body)
    if recalled is not None:
        known, end, length = recalled
        again = parse_response_head((second + body)[:end])
        assert (again.status, again.chunked, again.keep_alive) == (known.status, known.chunked, known.keep_alive)
        assert again.content_length == length
        differing = {name for name in again.headers if again.headers[name] != known.headers.get(name)}
        assert differing <= {b"date", b"content-length"} and set(again.headers) == set(known.headers)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_head_or_malformed(data: bytes) -> None:
    for parse in (parse_request_head, parse_response_head):
        try:
            parse(data + b"\r\n\r\n")
        except Malformed as malformed:
            assert malformed.status in (400, 417, 431, 502, 505)
