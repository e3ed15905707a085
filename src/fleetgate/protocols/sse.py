"""Server-sent events without I/O: cutting a stream into whole events, byte for byte."""

import re

EVENT_BYTES_MAX = 1024 * 1024  # FAULTS.md row 25
# A line end and a blank line, each ended by LF, CR LF or CR. A last CR may be the half of a CR LF that is still coming,
# so it counts when the next byte is here; behind another CR at once, for streams that use nothing else.
_EVENT_END = re.compile(rb"\r\r|(?>\r\n|\n|\r)(?:\r\n|\n|\r(?=[^\n]))")


class EventTooLong(Exception):
    """An event did not end within `EVENT_BYTES_MAX`."""


class Events:
    """Cuts payload bytes into whole events, each with the blank line that ends it.

    Shape: `partial` is the begin of an event that has not ended; at the end of a stream, a truncated one.
    Raises: `EventTooLong`.
    """

    __slots__ = ("partial",)

    def __init__(self) -> None:
        self.partial = b""

    def feed(self, payload: bytes) -> list[bytes]:
        """The events that are whole now, in order."""
        buffer = self.partial + payload if self.partial else payload
        if buffer.find(b"\r") >= 0:
            events, rest = _cut_any(buffer)
        else:
            *events, rest = buffer.split(b"\n\n")
            events = [event + b"\n\n" for event in events]
        if len(rest) > EVENT_BYTES_MAX:
            raise EventTooLong
        # What became too long and ended within one read is too long as well; its end may be two CR LF.
        if len(buffer) > EVENT_BYTES_MAX and any(len(event) > EVENT_BYTES_MAX + 4 for event in events):
            raise EventTooLong
        self.partial = rest
        return events


def _cut_any(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Cut at blank lines with any of the line ends that the format allows, mixed ones too."""
    events: list[bytes] = []
    start = 0
    for match in _EVENT_END.finditer(buffer):
        events.append(buffer[start : match.end()])
        start = match.end()
    return events, buffer[start:]


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined with a line feed; None when it has none (a comment, say)."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    lines = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    # A line `data` without a colon is data too, of nothing.
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
    return b"\n".join(data) if data else None
