"""A JSON body member by member: where each value stands, and which one holds what no engine can read."""

import re

import msgspec


class InvalidBody(Exception):
    """The body is not a request; `param` names the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


class _Name:
    """A key of an object. Each is one of its own, so that a dict keeps keys that are given twice."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_MEMBERS_MAX = 1000  # keys of one object that is walked; no request has a tenth of them
_SPACE = re.compile(rb"[ \t\r\n]*")
_KEY = re.compile(rb'[ \t\r\n]*"[^"\\]*(?:\\.[^"\\]*)*"[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)


def top_level(body: bytes) -> list[tuple[str, int, int]]:
    """Every key of a JSON object, in order and as often as it is given, with the place of its value.

    Raises: `InvalidBody` when the body is no JSON object, or has more than 1,000 keys.
    Cost: 10 µs and 2 µs a key; the values are skipped in C.
    """
    names: list[str] = []

    def name(kind: type, text: str) -> _Name:
        if len(names) == _MEMBERS_MAX:
            raise ValueError(f"an object has more than {_MEMBERS_MAX} keys")
        names.append(text)
        return _Name(text)

    try:
        values = msgspec.json.decode(body, type=dict[_Name, msgspec.Raw], dec_hook=name)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidBody("invalid_json", f"the request body is not valid JSON: {error}") from None
    at = body.index(b"{") + 1
    found: list[tuple[str, int, int]] = []
    for key, value in values.items():
        start = _end_of(_KEY, body, at)
        end = start + len(bytes(value))
        found.append((key.text, start, end))
        at = _end_of(_SPACE, body, end) + 1
    return found


def _end_of(pattern: re.Pattern[bytes], body: bytes, at: int) -> int:
    match = pattern.match(body, at)
    assert match is not None  # the decoder has read the same bytes
    return match.end()


def too_large(body: bytes) -> InvalidBody:
    """Name the field that holds a number beyond what parsers of JSON take. FAULTS.md row 37."""
    for name, start, end in top_level(body):
        try:
            msgspec.json.decode(body[start:end])
        except msgspec.ValidationError:
            shown = name[:60]
            message = f"`{shown}` holds a number that is too large; send less than 1e308 and less than 4300 digits"
            return InvalidBody("invalid_request", message, shown)
    return InvalidBody("invalid_request", "the request body holds a number that is too large")


_BYTE = re.compile(r"\(byte (\d+)\)")
_NO_NUMBER = re.compile(rb".?-?(?:NaN|aN|Infinity)", re.DOTALL)  # decoders stop at the first byte of it, or the second


def no_number(body: bytes, error: Exception) -> str:
    """What to do about `NaN` and its like, which some encoders write where they have no number."""
    place = _BYTE.search(str(error))
    if place is None or not _NO_NUMBER.match(body, max(0, int(place[1]) - 1)):
        return ""
    return "; NaN and Infinity are no JSON: leave the field out or send a number"
