"""Server-sent events without I/O: a stream is split into whole events, byte for byte."""

import re

from fleetgate.protocols.json_checks import is_json, is_text

EVENT_BYTES_MAX = 1024 * 1024  # faults.md row 25
# A line end and a blank line, each ended by LF, CR LF or CR. A last CR may be half of a CR LF, so it counts only when
# the next byte is known; after another CR it counts at once, for streams that use nothing else.
_EVENT_END = re.compile(rb"\r\r|(?>\r\n|\n|\r)(?:\r\n|\n|\r(?=[^\n]))")


class EventTooLong(Exception):
    """An event did not end within `EVENT_BYTES_MAX`."""


class Events:
    """Splits payload bytes into whole events, each with the blank line that ends it.

    Shape: `partial` holds the event that has not ended yet; at the end of a stream, a truncated one.
    Raises: `EventTooLong`.
    """

    __slots__ = ("partial",)

    def __init__(self) -> None:
        self.partial = b""

    def feed(self, payload: bytes) -> list[bytes]:
        """The events that are whole now, in order."""
        buffer = self.partial + payload if self.partial else payload
        if buffer.find(b"\r") >= 0:
            events, rest = _split_at_any_line_end(buffer)
        else:
            *events, rest = buffer.split(b"\n\n")
            events = [event + b"\n\n" for event in events]
        if len(rest) > EVENT_BYTES_MAX:
            raise EventTooLong
        # An event may become too long and end within one read; its end may be two CR LF.
        if len(buffer) > EVENT_BYTES_MAX and any(len(event) > EVENT_BYTES_MAX + 4 for event in events):
            raise EventTooLong
        self.partial = rest
        return events


def _split_at_any_line_end(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Split at blank lines with any of the line ends that the format allows, also mixed ones."""
    events: list[bytes] = []
    start = 0
    for match in _EVENT_END.finditer(buffer):
        events.append(buffer[start : match.end()])
        start = match.end()
    return events, buffer[start:]


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined with a line feed; None for an event without data, such as a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    lines = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    # A line `data` without a colon is an empty line of data.
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
    return b"\n".join(data) if data else None


def is_plain(event: bytes) -> bool:
    """Whether an event is one line `data: JSON`. A line end inside the JSON, which JSON allows, would end the data."""
    return event.find(b"\n") == len(event) - 2 and event.find(b"\r") < 0 and is_json(event[6:-2])


def as_text(event: bytes) -> bytes:
    """The event with bytes that are not UTF-8 replaced: the official SDKs fail on them. Source: faults.md row 26."""
    return event if event.isascii() or is_text(event) else event.decode(errors="replace").encode()
