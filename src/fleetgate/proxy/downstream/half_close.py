"""A client that sent a FIN while its answer is under way: has it left, or has it only nothing more to say?

Both look alike until something is sent: the kernel of a client that has closed answers with a reset, the kernel of one
that still reads does not. So something is sent that no reader notices: before an answer its own first bytes, one at a
time, which are the same for every answer; inside a stream a comment.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from fleetgate.proxy.transport import tcp_info as tcp

if TYPE_CHECKING:
    from fleetgate.proxy.downstream.client_connection import ClientConnection

ANSWER_BEGINS = b"HTTP/1.1 "
COMMENT = b":\n\n"  # both official SDKs ignore it: FAULTS.md section 1
LOOK_FIRST_S = 0.005  # a reset on this machine is there at once; a distant one within its round trip
LOOK_MAX_S = 1.0
PROBE_FIRST_S = 0.5  # it may leave later, and only a further probe tells
PROBE_MAX_S = 64.0
UNACKED_MAX_S = 5.0  # its kernel does not even acknowledge: it is gone, and something between us drops what we send


class ResponseStart(asyncio.Transport):
    """A transport whose next answer has begun: what was sent of it is left out of the first write."""

    def __init__(self, client: "ClientConnection", transport: asyncio.Transport) -> None:
        super().__init__()
        self._client = client
        self._transport = transport
        self.sent = 0

    def probe(self) -> None:
        """Send the next byte of the answer, if there is one that all answers share."""
        if self.sent < len(ANSWER_BEGINS):
            self._transport.write(ANSWER_BEGINS[self.sent : self.sent + 1])
            self.sent += 1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """The head, or the beginning of it: from here on the client's own transport is used again."""
        self._client.transport = self._transport
        if bytes(data[: len(ANSWER_BEGINS)]) == ANSWER_BEGINS:
            self._transport.write(data[self.sent :])
        else:
            self._transport.abort()  # a broken answer must not look like one

    def abort(self) -> None:
        self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        self._transport.write_eof()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


class HalfCloseDetector:
    """Finds out, as long as an answer is under way. Shape: made at the FIN; it keeps its own timer, for it is rare."""

    def __init__(self, client: "ClientConnection", loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._loop = loop
        self._transport = client.transport
        self._written = -1
        self._acked_bytes = -1
        self._acked_at_s = self._probed_at_s = loop.time()
        self._look_s = LOOK_FIRST_S
        self._probe_s = PROBE_FIRST_S
        self._probe()
        self._again()

    def _again(self) -> None:
        self._loop.call_later(self._look_s, self._look)
        self._look_s = min(2 * self._look_s, LOOK_MAX_S)

    def _look(self) -> None:
        if self._transport.is_closing() or not self._client.is_due:
            return
        now_s = self._loop.time()
        link = tcp.read_tcp_info(self._transport)
        if link is None or link.state != tcp.CLOSE_WAIT:
            self._transport.abort()
            return
        if not link.unacked or link.acked_bytes != self._acked_bytes:
            self._acked_bytes, self._acked_at_s = link.acked_bytes, now_s
        elif now_s - self._acked_at_s > UNACKED_MAX_S:
            self._transport.abort()
            return
        if now_s - self._probed_at_s >= self._probe_s:
            self._probed_at_s = now_s
            self._probe()
        self._again()

    def _probe(self) -> None:
        """Send something harmless, unless the answer itself has been sending."""
        client, conversation = self._client, self._client.conversation
        if conversation is None or self._transport.get_write_buffer_size():
            return
        if not conversation.written:
            if not isinstance(client.transport, ResponseStart):
                client.transport = ResponseStart(client, self._transport)
            client.transport.probe()
            self._probe_s = min(2 * self._probe_s, PROBE_MAX_S)  # there are nine such bytes, and ten minutes to wait
        elif conversation.written == self._written or self._written < 0:
            relay = conversation.relay
            if conversation.early_attempts or conversation.resumption or (relay is not None and relay.stream):
                self._transport.write(conversation.framed(COMMENT))
        self._written = conversation.written
