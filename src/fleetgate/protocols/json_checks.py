"""Checks on JSON bytes that build no values: validity, size, depth. `json_members` finds where members stand.

Source of the bounds: faults.md row 37.
"""

import msgspec

DEPTH_MAX = 64  # engines in Rust refuse 128; requests of SDKs stay far below
CONTAINERS_MAX = 100_000  # objects and arrays: a chat of ten thousand messages with all their parts
VALUES_MAX = 1_000_000  # a prompt may be given as token ids, a million of them for the longest contexts

SMALL_VALUES_MAX = 50_000  # decoding an object with so many keys takes 10 ms
SMALL_BYTES_MAX = 1_000_000  # decoding integers of thousands of digits takes 25 ms a MB

_BRACKETS = b"[]{}"
_AFTER_BACKSLASH = b"\\/bfnrtu"  # removed last: without them the quote that follows `\n` would look escaped
_COMMA = b","
BRACKETS_CHECKED_MAX = 300  # one by one, before the check of all at once
_PIECE_BYTES = 1024 * 1024

_skim = msgspec.json.Decoder(msgspec.Raw).decode


def is_json(data: bytes) -> bool:
    """Whether the bytes are one JSON value."""
    try:
        _skim(data)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def is_text(data: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_small(body: bytes) -> bool:
    """Whether decoding every value is cheap. Of a larger body only the members in use are decoded.

    Cost: 1 ms a MB; nothing up to 100 KB, which cannot hold more values.
    """
    size = len(body)
    if size <= 2 * SMALL_VALUES_MAX:
        return True
    return size <= SMALL_BYTES_MAX and body.count(_COMMA) + body.count(b"[") + body.count(b"{") <= SMALL_VALUES_MAX


def has_too_many_values(body: bytes) -> bool:
    """Whether there are more than `VALUES_MAX` commas and brackets outside of strings. The body may be invalid.

    Cost: nothing up to 1 MB, then 1 ms a MB up to the first value too many.
    """
    if len(body) <= VALUES_MAX or body.count(_COMMA) + body.count(b"[") + body.count(b"{") <= VALUES_MAX:
        return False
    left, at, inside = VALUES_MAX, 0, b""
    while at < len(body):
        end = at + _PIECE_BYTES
        while body.startswith(b"\\", end - 1):  # do not separate a backslash from the character that it escapes
            end += 1
        marks = inside + _marks(body[at:end], _PROSE_WITHOUT_COMMAS)
        bare = _outside_strings(marks)
        left -= bare.count(_COMMA) + bare.count(b"[")
        if left < 0:
            return True
        inside = b'"' if marks.count(b'"') % 2 else b""
        at = end
    return False


def is_too_deep(body: bytes) -> bool:
    """Whether valid JSON nests deeper than `DEPTH_MAX` or has more than `CONTAINERS_MAX` objects and arrays.

    Cost: 0.1 µs and 0.07 µs a bracket for up to 64 brackets, which cannot nest deeper; then 0.2 µs a bracket, and 1 µs
    a KiB if that is not conclusive.
    """
    find, left = body.find, DEPTH_MAX
    for mark in (b"[", b"{"):
        at = find(mark)
        while at >= 0:
            if not left:
                return not _are_siblings(body) and _nests_deeper(_outside_strings(_marks(body, _PROSE)))
            left -= 1
            at = find(mark, at + 1)
    return False


def _are_siblings(body: bytes) -> bool:
    """Whether all brackets but `DEPTH_MAX` follow a sibling, so that no value nests deeper.

    A bracket inside of a string that looks like a sibling changes nothing: it adds no depth.
    """
    left, unchecked = DEPTH_MAX, BRACKETS_CHECKED_MAX
    for mark in (b"[", b"{"):
        at = body.find(mark)
        while at >= 0:
            unchecked -= 1
            if body[at - 2 : at] != b"}," and body[at - 3 : at] != b"}, ":
                left -= 1
            if left < 0 or not unchecked:
                return False
            at = body.find(mark, at + 1)
    return True


def _all_but(kept: bytes) -> bytes:
    return bytes(byte for byte in range(256) if byte not in kept)


_PROSE = _all_but(_BRACKETS + b'"' + _AFTER_BACKSLASH)
_PROSE_WITHOUT_COMMAS = _all_but(_BRACKETS + b'"' + _AFTER_BACKSLASH + _COMMA)
_SQUARE = bytes.maketrans(b"{}", b"[]")


def _marks(body: bytes, prose: bytes) -> bytes:
    """Brackets, all made square, and the quotes that begin and end strings; the bytes of `prose` are dropped."""
    marks = body.translate(None, prose)
    if marks.find(b"\\") >= 0:
        marks = marks.replace(b"\\\\", b"").replace(b'\\"', b"")
    return marks.translate(_SQUARE, _AFTER_BACKSLASH)


def _outside_strings(marks: bytes) -> bytes:
    marks = marks.replace(b'""', b"")  # empty strings, or the border of two neighbours, which may count as one
    return b"".join(marks.split(b'"')[::2]) if marks.find(b'"') >= 0 else marks


def _nests_deeper(brackets: bytes) -> bool:
    if len(brackets) > 2 * CONTAINERS_MAX:
        return True
    for _ in range(DEPTH_MAX):  # each round removes the innermost level everywhere
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    return True
