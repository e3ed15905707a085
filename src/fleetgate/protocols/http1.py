"""HTTP/1.1 without I/O: strict heads, exact body framing, heads built from templates.

A head must pass two parsers: a strict grammar that allows nothing request smuggling could use, and llhttp. Heads and
framing are always written anew; no byte of framing is passed through.
"""

import re
from http import HTTPStatus

import httptools
import msgspec

HEAD_BYTES_MAX = 32 * 1024  # faults.md row 29
HEADERS_MAX = 64
BODY_BYTES_MAX = 20 * 1024 * 1024  # faults.md row 28
CHUNK_LINE_BYTES_MAX = 256
TRAILER_BYTES_MAX = 8 * 1024
CHUNK_EXCESS_BYTES_MAX = 16 * 1024  # framing beyond the payload; parsing one-byte chunks takes a second a megabyte

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELDS = rb"((?:" + _TOKEN + rb":[\t \x21-\x7e\x80-\xff]*\r\n)*)\r\n"
_REQUEST = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])\r\n" + _FIELDS)
_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t \x21-\x7e\x80-\xff]*)?\r\n" + _FIELDS)
_HOST = re.compile(rb"(?:[A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})\r\n")
_LENGTH_ANY_CASE = re.compile(rb"\r\n(?i:content-length): ([0-9]{1,15})\r\n")
LENGTH_DIGITS_MAX = 15
_DATE_BYTES = 29  # an IMF-fixdate has one length
_DATE = re.compile(rb"\r\n(?i:date): ([A-Za-z0-9,: ]{29})\r\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t \x21-\x7e]*)?")

HEAD_END = b"\r\n\r\n"


class Malformed(Exception):
    """Received bytes break HTTP/1.1 or the protocol above it; after a response of `status` the connection closes."""

    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class RequestHead(msgspec.Struct, frozen=True):
    """A request's head, parsed and checked.

    Shape: `headers` has lower-case names; the values of a repeated one are joined with `, `. `content_length` is -1
    without such a header.
    """

    method: bytes
    path: bytes
    query: bytes
    host: bytes
    headers: dict[bytes, bytes]
    content_length: int
    chunked: bool
    keep_alive: bool
    expects_continue: bool
    http10: bool


class ResponseHead(msgspec.Struct, frozen=True):
    """A response's head, parsed and checked. Shape: `content_length` is -1 without such a header."""

    status: int
    headers: dict[bytes, bytes]
    content_length: int
    chunked: bool
    keep_alive: bool
    event_stream: bool


class _Fields:
    """Collects the header fields that llhttp finds."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.items.append((name.lower(), value.rstrip(b" \t")))


def parse_request_head(head: bytes) -> RequestHead:
    """Parse a whole head, the blank line included.

    Raises: `Malformed` with 400, 417, 431 or 505.
    Cost: 5 µs for six headers; `HeadMemo` spares it if a connection's next head is the same.
    """
    match = _REQUEST.fullmatch(head)
    if match is None:
        raise _explain(head)
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # an Upgrade is never granted; the request is served as plain HTTP/1.1
    except httptools.HttpParserError as error:
        raise Malformed(400, f"malformed request head: {error}") from None
    method, target, minor = match[1], match[2], match[3]
    headers = _as_dict(fields.items)
    host = _host_of(fields.items, minor)
    length, chunked = _framing(fields.items, minor)
    connection = headers.get(b"connection", b"").lower()
    expect = headers.get(b"expect", b"").lower()
    if expect not in (b"", b"100-continue"):
        raise Malformed(417, "only `Expect: 100-continue` is supported")
    if not target.startswith(b"/") and not (method == b"OPTIONS" and target == b"*"):
        raise Malformed(400, "the request target must be a path that starts with /")
    path, _, query = target.partition(b"?")
    return RequestHead(
        method=method,
        path=path,
        query=query,
        host=host,
        headers=headers,
        content_length=length,
        chunked=chunked,
        keep_alive=b"close" not in connection if minor == b"1" else b"keep-alive" in connection,
        expects_continue=bool(expect) and minor == b"1",
        http10=minor == b"0",
    )


def parse_response_head(head: bytes) -> ResponseHead:
    """Parse a whole response head, the blank line included.

    Raises: `Malformed`; its status has no meaning here.
    Cost: 3 µs for five headers.
    """
    match = _RESPONSE.fullmatch(head)
    if match is None:
        raise Malformed(502, "the upstream's response head is malformed")
    fields = _Fields()
    try:
        httptools.HttpResponseParser(fields).feed_data(head)
    except httptools.HttpParserUpgrade:
        raise Malformed(502, "the upstream switched protocols without a request for it") from None
    except httptools.HttpParserError as error:
        raise Malformed(502, f"the upstream's response head is malformed: {error}") from None
    headers = _as_dict(fields.items)
    length, chunked = _framing(fields.items, match[1])
    connection = headers.get(b"connection", b"").lower()
    status = int(match[2])
    if status in (204, 304):  # no body, even if the head announces one: a client would take it for the next response
        length, chunked = 0, False
    return ResponseHead(
        status=status,
        headers=headers,
        content_length=length,
        chunked=chunked,
        keep_alive=b"close" not in connection if match[1] == b"1" else b"keep-alive" in connection,
        event_stream=status == 200 and headers.get(b"content-type", b"").startswith(b"text/event-stream"),
    )


def _as_dict(items: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    if len(items) > HEADERS_MAX:
        raise Malformed(431, f"more than {HEADERS_MAX} header fields; send fewer")
    headers = dict(items)
    if len(headers) != len(items):
        headers = {}
        for name, value in items:
            headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _host_of(items: list[tuple[bytes, bytes]], minor: bytes) -> bytes:
    hosts = [value for name, value in items if name == b"host"]
    if len(hosts) > 1 or (not hosts and minor == b"1"):
        raise Malformed(400, "a request needs exactly one Host header")
    if not hosts:
        return b""
    if not _HOST.fullmatch(hosts[0]):
        raise Malformed(400, "the Host header is not a host name with an optional port")
    return hosts[0].lower()


def _framing(items: list[tuple[bytes, bytes]], minor: bytes) -> tuple[int, bool]:
    """The body's length, and whether it is chunked. Only one of the two may be given. Source: faults.md row 30."""
    lengths = [value for name, value in items if name == b"content-length"]
    codings = [value for name, value in items if name == b"transfer-encoding"]
    if codings:
        if lengths:
            raise Malformed(400, "Content-Length and Transfer-Encoding are both given; send one of them")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise Malformed(400, "the only Transfer-Encoding supported is chunked")
        if minor == b"0":
            raise Malformed(400, "HTTP/1.0 has no Transfer-Encoding; send Content-Length")
        return -1, True
    if not lengths:
        return -1, False
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 15:
        raise Malformed(400, "Content-Length must be one number of decimal digits")
    return int(lengths[0]), False


def _explain(head: bytes) -> Malformed:
    """The most likely reason why the grammar refused a head."""
    line = head.split(b"\n", 1)[0]
    if re.search(rb" HTTP/[02-9]\.?[0-9]?\r?$", line):
        return Malformed(505, "only HTTP/1.0 and HTTP/1.1 are supported")
    if b"\n" in head.replace(b"\r\n", b"") or b"\r" in head.replace(b"\r\n", b""):
        return Malformed(400, "malformed request head: a line must end in CR LF")
    if re.search(rb"\r\n[ \t]", head):
        return Malformed(400, "malformed request head: folded header lines are not allowed")
    return Malformed(400, "malformed request head")


class HeadMemo:
    """A connection's last head; the next one is not parsed if only the digits of its Content-Length differ.

    SDK clients send the same head every time.

    Cost: 0.3 µs instead of 5 to 9.
    """

    __slots__ = ("_prefix", "_suffix")

    def __init__(self) -> None:
        self._prefix = b""
        self._suffix = b""

    def keep(self, head: bytes) -> bool:
        """Keep a head that was parsed with success; False if it has no plain Content-Length."""
        match = _LENGTH.search(head)
        if match is None:
            self._prefix = b""
            return False
        self._prefix, self._suffix = head[: match.start(1)], head[match.end(1) :]
        return True

    def recall(self, data: bytes) -> tuple[int, int]:
        """Where the kept head ends in `data`, and the Content-Length there; an end of 0 if the head is another."""
        prefix, suffix = self._prefix, self._suffix
        if not prefix or not data.startswith(prefix):
            return 0, 0
        start = len(prefix)
        stop = data.find(b"\r", start, start + LENGTH_DIGITS_MAX + 1)
        digits = data[start:stop]
        if not data.startswith(suffix, stop) or not digits.isdigit():
            return 0, 0
        return stop + len(suffix), int(digits)


def without_empty_lines(data: bytes) -> bytes:
    """The data without the empty lines that some clients send after a body. Cost: linear, 0.1 µs without such lines."""
    if not data.startswith(b"\r\n"):
        return data
    pairs = (len(data) - len(data.lstrip(b"\r\n"))) // 2
    return data.removeprefix(b"\r\n" * pairs)


class ResponseMemo:
    """An Endpoint's last response head; the next one is not parsed if only Date and the digits of its length differ.

    Shape: `passed` are the header lines for the client, `passed_by` the protocol that chose them; the caller sets both.
    Cost: 0.4 µs instead of 4, once a second 0.6.
    """

    __slots__ = ("_after_date", "_after_length", "_before", "_begin", "_head", "passed", "passed_by")

    def __init__(self) -> None:
        self._head: ResponseHead | None = None
        self._before = self._after_date = self._after_length = b""
        self._begin = b""  # up to the digits of the length, with the last Date: that stays the same for a second
        self.passed = b""
        self.passed_by: object = None

    def keep(self, head_bytes: bytes, head: ResponseHead) -> None:
        """Keep a head that was parsed with success, if a Date comes before its Content-Length, or it is chunked."""
        self._head = None
        date, length = _DATE.search(head_bytes), _LENGTH_ANY_CASE.search(head_bytes)
        if (
            date is None
            or (length is not None and length.start() < date.end() - 2)
            or (length is None and not head.chunked)
        ):
            return
        self._head = head
        self._before = head_bytes[: date.start(1)]
        self._after_date = head_bytes[date.end(1) : length.start(1) if length else len(head_bytes)]
        self._after_length = head_bytes[length.end(1) :] if length else b""
        self._begin = head_bytes[: length.start(1) if length else len(head_bytes)]

    def recall(self, data: bytes) -> tuple[ResponseHead, int, int] | None:
        """The kept head, its end in `data` and the Content-Length there (-1 for none); None if the head is another."""
        known = self._head
        if known is None or not (data.startswith(self._begin) or self._has_new_date(data)):
            return None
        start, after = len(self._begin), self._after_length
        if not after:
            return known, start, -1
        stop = data.find(b"\r", start, start + LENGTH_DIGITS_MAX + 1)
        digits = data[start:stop]
        if not data.startswith(after, stop) or not digits.isdigit():
            return None
        return known, stop + len(after), int(digits)

    def _has_new_date(self, data: bytes) -> bool:
        """Whether a head begins like the kept one except for its Date; if so, keep that Date."""
        before, middle = self._before, self._after_date
        date_end = len(before) + _DATE_BYTES
        date = data[len(before) : date_end]
        if not data.startswith(before) or not data.startswith(middle, date_end) or b"\r" in date or b"\n" in date:
            return False
        self._begin = data[: date_end + len(middle)]
        return True


class ChunkedBody:
    """Removes chunked framing, strictly.

    Shape: when `done`, `rest` holds the bytes after the body. `at_boundary` tells that the next byte begins a chunk's
    size line.
    Raises: `Malformed` if the framing is not exact.
    """

    __slots__ = ("_buffer", "_excess_bytes", "_left", "_state", "_trailer_bytes", "at_boundary", "done", "rest")

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._state = 0  # 0 size line, 1 data, 2 the line end after data, 3 trailers
        self._trailer_bytes = 0
        self._excess_bytes = 0
        self.at_boundary = True
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`; may be empty."""
        buffer = self._buffer + data if self._buffer else data
        at, parts = 0, []
        while not self.done:
            if self._state == 1:
                part = buffer[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left:
                    break
                self._state = 2
            elif self._state == 2:
                if len(buffer) - at < 2:
                    if buffer[at:] not in (b"", b"\r"):
                        raise Malformed(400, "malformed chunk: CR LF is missing after the data")
                    break
                if buffer[at : at + 2] != b"\r\n":
                    raise Malformed(400, "malformed chunk: CR LF is missing after the data")
                at += 2
                self._state = 0
            else:
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    self._check_line_length(len(buffer) - at)
                    break
                self._line(buffer[at:end])
                at = end + 2
        self._buffer = b"" if self.done else buffer[at:]
        self.at_boundary = self._state == 0 and not self._buffer and not self.done
        self.rest = buffer[at:] if self.done else b""
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_line_length(self, length: int) -> None:
        if length > (TRAILER_BYTES_MAX if self._state == 3 else CHUNK_LINE_BYTES_MAX):
            raise Malformed(400, "malformed chunk: the size line or a trailer is too long")

    def _line(self, line: bytes) -> None:
        self._check_line_length(len(line))
        if self._state == 3:  # trailers are parsed to their end and dropped
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > TRAILER_BYTES_MAX:
                raise Malformed(431, f"the trailers are larger than {TRAILER_BYTES_MAX} bytes")
            if line and not re.fullmatch(_TOKEN + rb":[\t \x21-\x7e\x80-\xff]*", line):
                raise Malformed(400, "malformed trailer")
            self.done = not line
            return
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise Malformed(400, "malformed chunk size")
        self._left = int(match[1], 16)
        self._excess_bytes = max(0, self._excess_bytes + len(line) + 4 - self._left)
        if self._excess_bytes > CHUNK_EXCESS_BYTES_MAX:
            raise Malformed(400, "malformed chunks: far more framing than payload; send larger chunks")
        self._state = 1 if self._left else 3


def chunk(payload: bytes) -> bytes:
    """The payload as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"


def status_line(status: int) -> bytes:
    """The status line, for example `HTTP/1.1 404 Not Found`, with its line end."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    return b"HTTP/1.1 %d %b\r\n" % (status, phrase.encode())
