"""The connection of a client, as the handler of its request uses it."""

from collections.abc import Callable
from typing import Protocol


class ClientStream(Protocol):
    """A client's connection, as a handler uses it."""

    keep_alive: bool
    write: Callable[[bytes], None]

    @property
    def is_behind(self) -> bool:
        """Whether the client reads slower than it is sent to."""

    def abort(self) -> None:
        """Close with a reset, so that an unfinished answer cannot be taken for a whole one."""

    def ended(self, now_s: float) -> None:
        """The answer is written."""

    def next_read_deadline_s(self, now_s: float) -> float:
        """Abort if the client has read nothing since the last call; until when it may read on."""

    def fail(self, request_id: bytes) -> None:
        """An internal error ended the request: say so, or close with a reset."""
