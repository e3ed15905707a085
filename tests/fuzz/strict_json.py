"""What a chat request's body must be, read by the standard library, to compare `parse_request` with another decoder.

Members of objects stay lists of pairs, so that a key given twice is seen, and numbers stay text.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from fleetgate.protocols.json_checks import CONTAINERS_MAX, DEPTH_MAX, VALUES_MAX

DIGITS_MAX = 4300  # of integers: as many as Python reads


class Refuse(Exception):
    """The body is not a request."""


class Number(str):
    """A number as it was written."""


class Members(list[tuple[str, Any]]):
    """An object's members in order."""

    def all_of(self, name: str) -> list[Any]:
        """Every value of this key."""
        return [value for key, value in self if key == name]


def _no_constant(name: str) -> None:
    raise ValueError(name)


_decoder = json.JSONDecoder(
    object_pairs_hook=Members, parse_int=Number, parse_float=Number, parse_constant=_no_constant, strict=True
)


def decode(data: bytes) -> Any:
    """Any JSON value, strictly.

    Raises: `Refuse`.
    """
    try:
        text = data.decode()
        value = _decoder.decode(text)
        _measure(value)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and lone surrogates are ValueErrors too
        raise Refuse(str(error)) from None
    return value


def _measure(value: Any) -> None:
    """No nesting beyond the limit, no more values than the limit, no text that is no text."""
    level, depth, count, container_count = [value], 0, 0, 0
    while level:
        below: list[Any] = []
        for one in level:
            if isinstance(one, Members):
                below += [inner for _, inner in one]
                for key, _ in one:
                    key.encode()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                one.encode()
        containers = [len(one) for one in level if isinstance(one, list)]
        depth += bool(containers)
        container_count += len(containers)
        count += sum(max(1, size) for size in containers)  # its bracket and its commas
        level = below
    if depth > DEPTH_MAX:
        raise ValueError("too deep")
    if count > VALUES_MAX:
        raise ValueError("too many values")
    if container_count > CONTAINERS_MAX:
        raise ValueError("too many containers")


class Reading:
    """What `parse_request` must read of a body."""

    def __init__(self, data: bytes) -> None:
        value = decode(data)
        if not isinstance(value, Members):
            raise Refuse("not an object")
        if any(_is_too_large(number) for number in _numbers(value)):
            raise Refuse("a number is too large")
        self.members = value
        names = value.all_of("model")
        if len(names) != 1:
            raise Refuse("not exactly one model")
        if not _is_text(names[0]) or not names[0]:
            raise Refuse("model is no name")
        self.model = str(names[0])
        streams = value.all_of("stream")
        if streams and not (streams[-1] is None or isinstance(streams[-1], bool)):
            raise Refuse("stream is neither true nor false")
        self.stream = bool(streams and streams[-1])
        self.has_options = bool(value.all_of("stream_options"))
        *earlier, last = value.all_of("stream_options") or [None]
        self.wants_usage = self._wants_usage(last)
        if not self.wants_usage:  # else nothing is written into any of them, and engines read the last one
            for options in earlier:
                self._wants_usage(options)

    def _wants_usage(self, options: Any) -> bool:
        if options is None:
            return False
        if not isinstance(options, Members):
            raise Refuse("stream_options is no object")
        wishes = options.all_of("include_usage")
        if any(not (one is None or isinstance(one, bool)) for one in wishes):
            raise Refuse("include_usage is neither true nor false")
        return bool(wishes and wishes[-1])


def _numbers(value: Any) -> Iterator[Number]:
    if isinstance(value, Number):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one[1] if isinstance(value, Members) else one)


def _is_too_large(number: Number) -> bool:
    is_whole = number.removeprefix("-").isdigit()
    return len(number.removeprefix("-")) >= DIGITS_MAX if is_whole else math.isinf(float(number))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)
