"""HTTP/1.1 read a second time, by the letter of RFC 9112, without code of the product.

It says what a connection's bytes are, whole: which requests, how long each body is, where trust ends.
"""

import ipaddress

import msgspec

HEAD_BYTES_MAX = 32 * 1024
FIELDS_MAX = 64
BODY_BYTES_MAX = 20 * 1024 * 1024
CHUNK_LINE_BYTES_MAX = 256
TRAILER_BYTES_MAX = 8 * 1024
TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
TEXT = frozenset([9, *range(32, 127), *range(128, 256)])
VISIBLE = frozenset(range(33, 127))
HEX = frozenset(b"0123456789abcdefABCDEF")
DIGITS = frozenset(b"0123456789")
POSTS = frozenset(
    b"/v1/chat/completions /v1/completions /v1/embeddings /v1/responses".split()
)  # what is passed on; everything else is answered by the gateway itself


class Bad(Exception):
    """Not HTTP, or not what is taken: one answer, then the end of the connection."""


class Head(msgspec.Struct):
    """A message's head. Shape: `fields` in order, names in lower case, values without the space around them."""

    first: bytes
    fields: list[tuple[bytes, bytes]]

    def all_of(self, name: bytes) -> list[bytes]:
        """Every value of a field."""
        return [value for known, value in self.fields if known == name]

    def joined(self, name: bytes) -> bytes:
        """All values as one, in lower case."""
        return b", ".join(self.all_of(name)).lower()


class Item(msgspec.Struct):
    """One request. Shape: `denied` when its head already says that it is not taken."""

    method: bytes
    path: bytes
    body: bytes
    http10: bool
    closes: bool
    expects: bool
    denied: bool
    has_body: bool
    body_missing: bool = False


class Reading(msgspec.Struct):
    """What a connection's bytes are: its requests, then `open` (more may come), `refused` or `closed`."""

    items: list[Item]
    end: str


def read_head(data: bytes) -> Head:
    """A head with its blank line.

    Raises: `Bad`.
    """
    lines = data[:-4].split(b"\r\n")
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise Bad("a bare CR or LF")
    fields: list[tuple[bytes, bytes]] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or not TOKEN.issuperset(name) or not TEXT.issuperset(value):
            raise Bad("a malformed field")
        if name.lower() == b"transfer-encoding" and value.endswith(b"\t"):
            raise Bad("a tab behind the coding, which llhttp does not take")
        fields.append((name.lower(), value.strip(b" \t")))
    if len(fields) > FIELDS_MAX:
        raise Bad("too many fields")
    return Head(lines[0], fields)


def framing(head: Head, http10: bool) -> tuple[int, bool]:
    """The body's length (-1 where none is said) and whether it is chunked.

    Raises: `Bad`.
    """
    lengths, codings = head.all_of(b"content-length"), head.all_of(b"transfer-encoding")
    if codings:
        if lengths or http10 or len(codings) > 1 or codings[0].lower() != b"chunked":
            raise Bad("unclear framing")
        return -1, True
    if not lengths:
        return -1, False
    if len(lengths) > 1 or not lengths[0] or not DIGITS.issuperset(lengths[0]) or len(lengths[0]) > 15:
        raise Bad("not one length")
    return int(lengths[0]), False


def read_chunks(data: bytes, at: int) -> tuple[bytes, int] | None:
    """A chunked body's payload and where it ends; None while it is not whole.

    Raises: `Bad`.
    """
    payload = b""
    while True:
        end = data.find(b"\r\n", at)
        line = data[at:end] if end >= 0 else data[at:]
        if len(line) > CHUNK_LINE_BYTES_MAX:
            raise Bad("a long size line")
        if end < 0:
            return None
        size_text, semicolon, extension = line.partition(b";")
        size_text = size_text.rstrip(b" \t") if semicolon else size_text
        if not 1 <= len(size_text) <= 8 or not HEX.issuperset(size_text) or not TEXT.issuperset(extension):
            raise Bad("no chunk size")
        if any(byte > 127 for byte in extension):
            raise Bad("no chunk size")
        size, at = int(size_text, 16), end + 2
        if not size:
            return _read_trailers(data, at, payload)
        payload += data[at : at + size]
        if len(data) < at + size + 2:
            if data[at + size :] not in (b"", b"\r"):
                raise Bad("no line end behind a chunk")
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise Bad("no line end behind a chunk")
        at += size + 2


def _read_trailers(data: bytes, at: int, payload: bytes) -> tuple[bytes, int] | None:
    begin = at
    while True:
        end = data.find(b"\r\n", at)
        if (len(data) if end < 0 else end + 2) - begin > TRAILER_BYTES_MAX:
            raise Bad("long trailers")
        if end < 0:
            return None
        if end == at:
            return payload, end + 2
        name, colon, value = data[at:end].partition(b":")
        if not colon or not name or not TOKEN.issuperset(name) or not TEXT.issuperset(value):
            raise Bad("a malformed trailer")
        at = end + 2


# --- requests ---------------------------------------------------------------------------------------------------------


def read_requests(data: bytes, gateway: bytes = b"chat.test") -> Reading:
    """Everything that a client sent on one connection."""
    items: list[Item] = []
    at = 0
    while True:
        while data.startswith(b"\r\n", at):
            at += 2
        end = data.find(b"\r\n\r\n", at)
        if (len(data) if end < 0 else end) - at > HEAD_BYTES_MAX:
            return Reading(items, "refused")
        if end < 0:
            return Reading(items, "open")
        try:
            item, length, chunked = _read_request(read_head(data[at : end + 4]), gateway)
            at = end + 4
            if item.denied:
                items.append(item)
                if chunked or len(data) - at < length:
                    item.body_missing = True
                    return Reading(items, "closed")
                at += max(0, length)
            elif chunked:
                whole = read_chunks(data, at)
                if whole is None:
                    return Reading(items, "open")
                item.body, at = whole
                items.append(item)
            else:
                if length > BODY_BYTES_MAX:
                    return Reading(items, "refused")
                if len(data) - at < length:
                    return Reading(items, "open")
                item.body = data[at : at + max(0, length)]
                items.append(item)
                at += max(0, length)
        except Bad:
            return Reading(items, "refused")
        if item.closes:
            return Reading(items, "closed")


def _read_request(head: Head, gateway: bytes) -> tuple[Item, int, bool]:
    words = head.first.split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Bad("no request line")
    method, target, http10 = words[0], words[1], words[2] == b"HTTP/1.0"
    if not 1 <= len(method) <= 20 or not all(65 <= byte <= 90 for byte in method):
        raise Bad("no method")
    if not target or not VISIBLE.issuperset(target):
        raise Bad("no target")
    hosts = head.all_of(b"host")
    if len(hosts) > 1 or (not hosts and not http10):
        raise Bad("not one Host")
    host = _host(hosts[0]) if hosts else b""
    length, chunked = framing(head, http10)
    expect = head.joined(b"expect")
    if expect not in (b"", b"100-continue"):
        raise Bad("expects something else")
    if not target.startswith(b"/") and not (method == b"OPTIONS" and target == b"*"):
        raise Bad("no path")
    connection = head.joined(b"connection")
    path = target.partition(b"?")[0]
    item = Item(
        method=method,
        path=path,
        body=b"",
        http10=http10,
        closes=b"keep-alive" not in connection if http10 else b"close" in connection,
        expects=bool(expect) and not http10,
        denied=_is_denied(method, path, host, gateway, head),
        has_body=chunked or length > 0,
    )
    return item, length, chunked


def _host(value: bytes) -> bytes:
    name, port = value, b""
    if value.startswith(b"["):
        inner, bracket, port = value[1:].partition(b"]")
        if not bracket or not inner or not HEX.union(b":.").issuperset(inner):
            raise Bad("no Host")
        name = b"[" + inner + b"]"
    elif b":" in value:
        name, _, port = value.partition(b":")
        port = b":" + port
    if port and (not port.startswith(b":") or not 2 <= len(port) <= 6 or not DIGITS.issuperset(port[1:])):
        raise Bad("no Host")
    if not name.startswith(b"[") and (not name or not TOKEN.union(b"_").issuperset(name)):
        raise Bad("no Host")
    if not name.startswith(b"[") and set(name) & set(b"!#$%&'*+^`|~"):
        raise Bad("no Host")
    return name.lower()


def _is_denied(method: bytes, path: bytes, host: bytes, gateway: bytes, head: Head) -> bool:
    name = host.removesuffix(b".")
    if name != gateway and host != b"" and name != b"localhost" and host != b"localhost" and not _is_address(host):
        return True
    origin = b", ".join(head.all_of(b"origin"))
    if head.all_of(b"origin") and origin.partition(b"://")[2] != head.joined(b"host"):
        return True
    models = path == b"/v1/models" or path.startswith(b"/v1/models/")
    return not (method == b"POST" and path in POSTS) and not (models and method in (b"GET", b"HEAD"))


def _is_address(host: bytes) -> bool:
    try:
        ipaddress.ip_address(host.strip(b"[]").decode())
    except ValueError:
        return False
    return True


# --- responses --------------------------------------------------------------------------------------------------------


class Response(msgspec.Struct):
    """One response. Shape: `whole` says that it ended as its framing promised; `after` is where the next one begins."""

    status: int
    head: Head
    body: bytes
    whole: bool
    after: int
    length: int
    chunked: bool
    keep_alive: bool


def read_response(data: bytes, at: int, ended: bool, bodiless: bool = False) -> Response | None:
    """The response that begins at `at`; None while its head is not whole. Shape: `ended` by the connection's end.

    Raises: `Bad`.
    """
    end = data.find(b"\r\n\r\n", at)
    if (len(data) if end < 0 else end) - at > HEAD_BYTES_MAX:
        raise Bad("a long head")
    if end < 0:
        return None
    head = read_head(data[at : end + 4])
    version, _, rest = head.first.partition(b" ")
    code, _, phrase = rest.partition(b" ")
    good = len(code) == 3 and DIGITS.issuperset(code) and b"1" <= code[:1] <= b"5" and TEXT.issuperset(phrase)
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or not good:
        raise Bad("no status line")
    status, http10 = int(code), version == b"HTTP/1.0"
    length, chunked = framing(head, http10)
    connection = head.joined(b"connection")
    keep = b"keep-alive" in connection if http10 else b"close" not in connection
    made = Response(status, head, b"", True, end + 4, length, chunked, keep)
    if status < 200 or status in (204, 304) or bodiless:
        return made
    if chunked:
        whole = read_chunks(data, end + 4)
        if whole is None:
            made.body, made.whole, made.after = _payload_so_far(data, end + 4), False, len(data)
        else:
            made.body, made.after = whole
    elif length >= 0:
        made.body = data[end + 4 : end + 4 + length]
        made.whole = len(made.body) == length
        made.after += len(made.body)
    else:
        made.body, made.whole, made.after, made.keep_alive = data[end + 4 :], ended, len(data), False
    return made


def payload_until_bad(data: bytes) -> bytes:
    """The payload of a response, of one with damaged chunks up to the damage."""
    response = read_response(data, 0, True, bodiless=True)
    if response is None:
        return b""
    if response.chunked:
        return _payload_so_far(data, response.after)
    return data[response.after :] if response.length < 0 else data[response.after :][: response.length]


def _payload_so_far(data: bytes, at: int) -> bytes:
    payload = b""
    while (end := data.find(b"\r\n", at)) >= 0:
        size_text = data[at:end].partition(b";")[0].rstrip(b" \t")
        size = int(size_text, 16) if 1 <= len(size_text) <= 8 and HEX.issuperset(size_text) else 0
        if not size:
            break
        payload += data[end + 2 : end + 2 + size]
        at = end + 4 + size
        if data[at - 2 : at] != b"\r\n":
            break
    return payload
