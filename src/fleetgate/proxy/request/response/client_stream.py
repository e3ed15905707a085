"""The connection of a client, as the handler of its request uses it."""

from collections.abc import Callable
from typing import Protocol


class ClientStream(Protocol):
    """A client's connection, as a handler uses it."""

    keep_alive: bool
    write: Callable[[bytes], None]

    @property
    def is_behind(self) -> bool:
        """Whether the client reads slower than data is sent."""

    def abort(self) -> None:
        """Close with a reset, so that an unfinished response does not look complete."""

    def ended(self, now_s: float) -> None:
        """The response is written."""

    def next_read_deadline_s(self, now_s: float) -> float:
        """Abort if the client has read nothing since the last call. Returns the next deadline."""

    def fail(self, request_id: bytes) -> None:
        """End the request after an internal error: with an error response, or with a reset."""
