"""How deep and how large a JSON body may be, found out without reading it. FAULTS.md row 37."""

DEPTH_MAX = 64  # engines in Rust refuse at 128, and no request of any SDK comes near this
CONTAINERS_MAX = 100_000  # objects and arrays: a chat of ten thousand messages with all their parts
VALUES_MAX = 1_000_000  # a prompt may be given as token ids, a million of them for the longest contexts

READ_MAX = 50_000  # values that are decoded to look at each; objects of that many keys of their own take 10 ms
READ_BYTES_MAX = 1_000_000  # integers of thousands of digits take 25 ms a MB

_BRACKETS = b"[]{}"
_AFTER_BACKSLASH = b"\\/bfnrtu"  # kept at first, or the quote behind `\n` would look escaped
_COMMA = b","
LOOKS_MAX = 300  # at brackets one by one, before all are looked at together
_PIECE_BYTES = 1024 * 1024


def _all_but(kept: bytes) -> bytes:
    return bytes(byte for byte in range(256) if byte not in kept)


_PROSE = _all_but(_BRACKETS + b'"' + _AFTER_BACKSLASH)
_PROSE_WITHOUT_COMMAS = _all_but(_BRACKETS + b'"' + _AFTER_BACKSLASH + _COMMA)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def is_acceptable(body: bytes) -> bool:
    """Whether each value may be decoded: of larger bodies and of more values only what is asked for is.

    Cost: 1 ms a MB, nothing up to 100 KB, which hold no more values.
    """
    size = len(body)
    if size <= 2 * READ_MAX:
        return True
    return size <= READ_BYTES_MAX and body.count(_COMMA) + body.count(b"[") + body.count(b"{") <= READ_MAX


def has_too_many_values(body: bytes) -> bool:
    """Whether commas and brackets outside of strings are more than `VALUES_MAX`; the body need not be valid.

    Cost: nothing up to 1 MB, then 1 ms a MB, and no more than it takes to find too many.
    """
    if len(body) <= VALUES_MAX or body.count(_COMMA) + body.count(b"[") + body.count(b"{") <= VALUES_MAX:
        return False
    left, at, inside = VALUES_MAX, 0, b""
    while at < len(body):
        end = at + _PIECE_BYTES
        while body.startswith(b"\\", end - 1):  # what it escapes belongs to it
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

    Cost: 0.1 µs and 0.07 µs a bracket, up to 64 of them, which cannot nest deeper; then 0.2 µs a bracket, and 1 µs a
    KiB where that does not tell.
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
    """Whether all brackets but `DEPTH_MAX` follow a sibling: then none nests deeper.

    One inside of a string that looks as if it did adds nothing, and takes nothing away.
    """
    left, looks = DEPTH_MAX, LOOKS_MAX
    for mark in (b"[", b"{"):
        at = body.find(mark)
        while at >= 0:
            looks -= 1
            if body[at - 2 : at] != b"}," and body[at - 3 : at] != b"}, ":
                left -= 1
            if left < 0 or not looks:
                return False
            at = body.find(mark, at + 1)
    return True


def _marks(body: bytes, prose: bytes) -> bytes:
    """Brackets, all of one kind, and the quotes that begin and end strings; none of the bytes of `prose`."""
    marks = body.translate(None, prose)
    if marks.find(b"\\") >= 0:
        marks = marks.replace(b"\\\\", b"").replace(b'\\"', b"")
    return marks.translate(_ONE_KIND, _AFTER_BACKSLASH)


def _outside_strings(marks: bytes) -> bytes:
    marks = marks.replace(b'""', b"")  # strings that are empty now, or two in a row, which may as well be one
    return b"".join(marks.split(b'"')[::2]) if marks.find(b'"') >= 0 else marks


def _nests_deeper(brackets: bytes) -> bool:
    if len(brackets) > 2 * CONTAINERS_MAX:
        return True
    for _ in range(DEPTH_MAX):  # each round takes off the innermost level everywhere
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    return True
