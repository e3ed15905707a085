"""What may still come after an answer that is over for its client."""

from fleetgate.protocols.http1 import ChunkedBody, Malformed
from fleetgate.proxy.transport.connection_pool import UpstreamConnection


class BodyDrain:
    """Reads the terminating chunk that follows `[DONE]`, so that the connection can be used again.

    The client has its whole answer by then and waits for nothing.
    """

    __slots__ = ("_chunked", "_connection")

    def __init__(self, connection: UpstreamConnection, chunked: ChunkedBody | None) -> None:
        self._connection = connection
        self._chunked = chunked
        if chunked is None:
            connection.drop()

    def on_data(self, data: bytes) -> None:
        """Only the end of the body may come."""
        chunked = self._chunked
        try:
            more = chunked.feed(data) if chunked is not None else b""
        except Malformed:
            self._connection.drop()
            return
        if more.strip() or chunked is None or chunked.rest:
            self._connection.drop()
        elif chunked.done:
            self._connection.release(self._connection.idle_since_s)

    def on_lost(self, error: Exception | None) -> None:
        """Nothing is lost."""
