"""Server-sent events without I/O: cutting a stream into whole events, byte for byte."""

EVENT_BYTES_MAX = 1024 * 1024  # FAULTS.md row 25


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
        self.partial = rest
        return events


def _cut_any(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Cut at blank lines with any of the line ends that the format allows."""
    events: list[bytes] = []
    start = at = 0
    while True:
        ends = [(found, len(mark)) for mark in (b"\n\n", b"\r\n\r\n", b"\r\r") if (found := buffer.find(mark, at)) >= 0]
        if not ends:
            return events, buffer[start:]
        found, length = min(ends)
        start_next = found + length
        events.append(buffer[start:start_next])
        start = at = start_next


def data_of(event: bytes) -> bytes | None:
    """The data of an event, its lines joined with a line feed; None when it has none (a comment, say)."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    lines = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return b"\n".join(data) if data else None
