"""Detects whether a client that sent a FIN while its response is due has left or still reads.

The two differ only in their reply to data: the kernel of a closed client sends a reset, the kernel of a reading one
does not. Therefore harmless bytes are sent: before a response its first bytes, one at a time, which are the same for
every response; inside a stream a comment.
"""

import asyncio
from typing import Protocol

from fleetgate.proxy.transport import tcp_info

RESPONSE_START = b"HTTP/1.1 "
COMMENT = b":\n\n"  # both official SDKs ignore it: faults.md section 1
CHECK_FIRST_S = 0.005  # a reset takes no time on this machine, else one round trip
CHECK_MAX_S = 1.0
PROBE_FIRST_S = 0.5  # a client that leaves later is detected only by a further probe
PROBE_MAX_S = 64.0
UNACKED_MAX_S = 5.0  # a client without acknowledgements for so long has left, and its packets are dropped on the way


class ResponseStart:
    """Sends the first bytes of a response early, and removes them from the response."""

    __slots__ = ("_sent", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0

    def probe(self) -> None:
        """Send the next byte of the response, if all responses share one."""
        if self._sent < len(RESPONSE_START):
            self._transport.write(RESPONSE_START[self._sent : self._sent + 1])
            self._sent += 1

    def write(self, data: bytes) -> None:
        """Send the head of the response, or its beginning, without the bytes that were sent."""
        if data[: len(RESPONSE_START)] == RESPONSE_START:
            self._transport.write(data[self._sent :])
        else:
            self._transport.abort()  # the bytes that were sent are not the beginning of this data


class HalfClosedClient(Protocol):
    """A connection after its client sent a FIN."""

    @property
    def is_response_due(self) -> bool:
        """Whether the rest of a response is due."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the response that were sent, -1 while no request is in flight."""

    def probe_start(self) -> None:
        """Send the next byte of the response's first bytes."""

    def probe_stream(self) -> None:
        """Send a comment, if the response is a stream."""


class HalfCloseDetector:
    """Checks one connection while a response is due. Made at the FIN; it is rare, so it has its own timer."""

    def __init__(self, client: HalfClosedClient, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._transport = transport
        self._written = -1
        self._acked_bytes = -1
        self._acked_at_s = self._probed_at_s = loop.time()
        self._check_s = CHECK_FIRST_S
        self._probe_s = PROBE_FIRST_S
        self._probe()
        self._schedule()

    def _schedule(self) -> None:
        self._loop.call_later(self._check_s, self._check)
        self._check_s = min(2 * self._check_s, CHECK_MAX_S)

    def _check(self) -> None:
        if self._transport.is_closing() or not self._client.is_response_due:
            return
        now_s = self._loop.time()
        info = tcp_info.read_tcp_info(self._transport)
        if info is None or info.state != tcp_info.CLOSE_WAIT:
            self._transport.abort()
            return
        if not info.unacked or info.acked_bytes != self._acked_bytes:
            self._acked_bytes, self._acked_at_s = info.acked_bytes, now_s
        elif now_s - self._acked_at_s > UNACKED_MAX_S:
            self._transport.abort()
            return
        if now_s - self._probed_at_s >= self._probe_s:
            self._probed_at_s = now_s
            self._probe()
        self._schedule()

    def _probe(self) -> None:
        """Send a harmless byte or comment, unless the response itself was sent meanwhile."""
        written = self._client.bytes_written
        if written < 0 or self._transport.get_write_buffer_size():
            return
        if not written:
            self._client.probe_start()
            self._probe_s = min(2 * self._probe_s, PROBE_MAX_S)  # nine such bytes must last for ten minutes
        elif written == self._written or self._written < 0:
            self._client.probe_stream()
        self._written = written
