"""A client that sent a FIN while its answer is due: has it left, or has it only nothing more to send?

Both look alike until something is sent: the kernel of a client that has closed answers with a reset, the kernel of one
that still reads does not. So bytes are sent that no reader notices: before an answer its own first bytes, one at a
time, which are the same for every answer; inside a stream a comment.
"""

import asyncio
from typing import Protocol

from fleetgate.proxy.transport import tcp_info

RESPONSE_START = b"HTTP/1.1 "
COMMENT = b":\n\n"  # both official SDKs ignore it: faults.md section 1
CHECK_FIRST_S = 0.005  # a reset on this machine is there at once; a distant one within its round trip
CHECK_MAX_S = 1.0
PROBE_FIRST_S = 0.5  # the client may leave later, and only a further probe shows it
PROBE_MAX_S = 64.0
UNACKED_MAX_S = 5.0  # without an acknowledgement the client is gone, and something between drops what we send


class ResponseStart:
    """Sends the first bytes of an answer ahead of it, and leaves them out of the answer."""

    __slots__ = ("_sent", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0

    def probe(self) -> None:
        """Send the next byte of the answer, if there is one that all answers share."""
        if self._sent < len(RESPONSE_START):
            self._transport.write(RESPONSE_START[self._sent : self._sent + 1])
            self._sent += 1

    def write(self, data: bytes) -> None:
        """Send the head of the answer, or its beginning, without the bytes that are sent already."""
        if data[: len(RESPONSE_START)] == RESPONSE_START:
            self._transport.write(data[self._sent :])
        else:
            self._transport.abort()  # what began as an answer must not go on as something else


class HalfClosedClient(Protocol):
    """A connection after its client sent a FIN."""

    @property
    def is_response_due(self) -> bool:
        """Whether a request still waits for the rest of its answer."""

    @property
    def bytes_written(self) -> int:
        """Bytes of the answer that were sent, -1 while no request is in flight."""

    def probe_start(self) -> None:
        """Send the next byte of the answer's first bytes."""

    def probe_stream(self) -> None:
        """Send a comment, if the answer is a stream."""


class HalfCloseDetector:
    """Watches one connection as long as an answer is due. Made at the FIN; it keeps its own timer, for it is rare."""

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
        """Send something harmless, unless the answer itself has been sending."""
        written = self._client.bytes_written
        if written < 0 or self._transport.get_write_buffer_size():
            return
        if not written:
            self._client.probe_start()
            self._probe_s = min(2 * self._probe_s, PROBE_MAX_S)  # there are nine such bytes, and ten minutes to wait
        elif written == self._written or self._written < 0:
            self._client.probe_stream()
        self._written = written
