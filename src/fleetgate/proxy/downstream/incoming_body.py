"""A request's body that does not come in one read."""

from fleetgate.protocols.http1 import ChunkedBody
from fleetgate.proxy.request.request_context import RequestContext

BODY_GRACE_S = 5.0  # how late a body may be at first; faults.md row 4
BODY_SLACK_MAX_S = 15.0  # the most that a fast body gains: mobile clients have gaps of seconds
BODY_BYTES_PER_S_MIN = 1024


class IncomingBody:
    """Collects a body. Shape: `length` of a body with Content-Length; `chunks` decodes one without it."""

    __slots__ = ("_chunks", "_missing", "_parts", "_rated_bytes", "_slack_s", "context", "received_bytes", "rest")

    def __init__(self, context: RequestContext, length: int, chunks: ChunkedBody | None) -> None:
        self.context = context
        self.received_bytes = 0
        self.rest = b""  # the bytes after the body
        self._chunks = chunks
        self._missing = length
        self._parts: list[bytes] = []
        self._rated_bytes = 0  # at the last check of its pace
        self._slack_s = BODY_GRACE_S

    @property
    def is_chunked(self) -> bool:
        """Whether its length is unknown before its end."""
        return self._chunks is not None

    def feed(self, data: bytes) -> int:
        """Add bytes. Returns how many of them belong to the body.

        Raises: `Malformed` for wrong chunks.
        """
        if self._chunks is not None:
            data = self._chunks.feed(data)
            self.rest = self._chunks.rest
        else:
            self.rest = data[self._missing :]
            data = data[: self._missing]
            self._missing -= len(data)
        self._parts.append(data)
        self.received_bytes += len(data)
        return len(data)

    @property
    def is_whole(self) -> bool:
        """Whether it is complete."""
        return self._chunks.done if self._chunks is not None else not self._missing

    def join(self) -> bytes:
        """The whole body."""
        return b"".join(self._parts)

    def is_fast_enough(self, passed_s: float) -> bool:
        """Whether the rate since the last check, so many seconds ago, is enough, or earlier speed makes up for it."""
        came_bytes, self._rated_bytes = self.received_bytes - self._rated_bytes, self.received_bytes
        self._slack_s = min(self._slack_s + came_bytes / BODY_BYTES_PER_S_MIN - passed_s, BODY_SLACK_MAX_S)
        return self._slack_s >= 0
