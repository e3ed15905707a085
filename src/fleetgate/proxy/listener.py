"""The client's side of a connection: strict framing in, one request at a time, answers in order."""

import asyncio
from math import inf
from typing import TYPE_CHECKING

from fleetgate.core.policy import ALLOWED
from fleetgate.protocols import http1, openai
from fleetgate.protocols.http1 import ChunkedBody, HeadMemo, Malformed
from fleetgate.protocols.openai import InvalidBody
from fleetgate.proxy import answers
from fleetgate.proxy.conversation import Conversation
from fleetgate.proxy.gate import Admitted, Denied, admit
from fleetgate.proxy.policing import judge

if TYPE_CHECKING:
    from fleetgate.proxy.hub import Hub

HEAD_WAIT_MAX_S = 10.0  # FAULTS.md row 4
BODY_WAIT_MAX_S = 60.0
IDLE_MAX_S = 75.0  # longer than what load balancers in front usually keep
LINGER_S = 1.0
PIPELINED_BYTES_MAX = 64 * 1024
WRITE_BUFFER_BYTES_MAX = 256 * 1024  # FAULTS.md row 5
UNREAD_MAX_S = 60.0  # without the client taking a byte; FAULTS.md row 5
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    """One client connection. The sweep looks at `deadline_s`; no timer is ever set."""

    __slots__ = (
        "_admitted",
        "_buffer",
        "_chunks",
        "_hub",
        "_memo",
        "_missing",
        "_parts",
        "_paused",
        "_received",
        "_remembered",
        "_unread",
        "_unsent_bytes",
        "closing",
        "conversation",
        "deadline_s",
        "keep_alive",
        "transport",
    )

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self.transport: asyncio.Transport
        self._buffer = b""
        self._memo = HeadMemo()
        self._remembered: Admitted | None = None  # what the head in `_memo` led to; the two change together
        self._admitted: Admitted | None = None  # of the body that is still coming
        self._parts: list[bytes] | None = None  # a body that is still coming
        self._missing = 0
        self._received = 0
        self._chunks: ChunkedBody | None = None
        self._paused = False  # reading, while a request is served
        self._unread = False  # the client is behind with reading what it was sent
        self._unsent_bytes = 0  # at the last look
        self.conversation: Conversation | None = None
        self.keep_alive = True
        self.closing = False
        self.deadline_s = 0.0

    # --- the loop's calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self.deadline_s = self._hub.clock() + HEAD_WAIT_MAX_S
        self._hub.connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._hub.disconnected(self)
        self.closing = True
        conversation, self.conversation = self.conversation, None
        if conversation is not None:
            conversation.client_gone()

    def eof_received(self) -> bool:
        # A client that closes sends the same FIN as one that only stops writing. The first is common, and its GPU
        # must be freed at once; the second is not, so a FIN counts as leaving.
        return False

    def pause_writing(self) -> None:
        self._unread = True
        if self.conversation is not None:
            self.conversation.pause()

    def resume_writing(self) -> None:
        self._unread = False
        if self.conversation is not None:
            self.conversation.resume()
        else:
            self._go_on()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            self._received += len(data)
            if self._received > PIPELINED_BYTES_MAX:
                self.transport.abort()
        elif self._parts is not None:
            self._more_body(data)
        elif self.conversation is not None or self._unread:
            self._buffer += data
            if len(self._buffer) > PIPELINED_BYTES_MAX and not self._paused:
                self._paused = True
                self.transport.pause_reading()
        else:
            self._read_head(self._buffer + data if self._buffer else data)

    # --- a request comes in ---

    def _read_head(self, data: bytes) -> None:
        known = self._remembered
        if known is not None and known.tables is self._hub.tables:
            end, length = self._memo.recall(data)
            if end:
                self._buffer = b""
                self._begin(known, length, data[end:])
                return
        while data.startswith(b"\r\n"):  # some clients end a body with an extra line
            data = data[2:]
        end = data.find(http1.HEAD_END)
        if (len(data) if end < 0 else end) > http1.HEAD_BYTES_MAX:
            self._deny_and_close(Denied(431, "invalid_request", f"header over {http1.HEAD_BYTES_MAX} bytes"))
            return
        if end < 0:
            if data and not self._buffer:
                self.deadline_s = self._hub.clock() + HEAD_WAIT_MAX_S
            self._buffer = data
            return
        self._buffer = b""
        self._read_new_head(data[: end + 4], data[end + 4 :])

    def _read_new_head(self, head: bytes, rest: bytes) -> None:
        self._remembered = None
        try:
            parsed = http1.parse_request_head(head)
        except Malformed as error:
            self._deny_and_close(Denied(error.status, error.code, error.message))
            return
        self.keep_alive = parsed.keep_alive
        try:
            admitted = admit(parsed, self._hub)
        except Denied as denied:
            if not parsed.chunked and max(parsed.content_length, 0) <= len(rest):
                self._buffer = rest[max(parsed.content_length, 0) :]
                self._deny(denied, no_body=parsed.method == b"HEAD")
            else:
                self._deny_and_close(denied)
            return
        if parsed.keep_alive and not parsed.expects_continue and not admitted.key.expires_s and self._memo.keep(head):
            self._remembered = admitted
        if parsed.chunked:
            self._chunks = ChunkedBody()
        self._begin(admitted, 0 if parsed.content_length < 0 else parsed.content_length, rest)

    def _begin(self, admitted: Admitted, length: int, rest: bytes) -> None:
        if length > http1.BODY_BYTES_MAX:
            self._deny_and_close(Denied(413, "invalid_request", _too_large()))
            return
        if self._chunks is None and length <= len(rest):
            self._buffer = rest[length:]
            self._serve(admitted, rest[:length])
            return
        self._pending(admitted, length)
        if admitted.head.expects_continue and not rest:
            self.transport.write(_CONTINUE)
        if rest:
            self._more_body(rest)

    def _pending(self, admitted: Admitted, length: int) -> None:
        self._admitted = admitted
        self._parts = []
        self._received = 0
        self._missing = length
        self.deadline_s = self._hub.clock() + BODY_WAIT_MAX_S

    def _more_body(self, data: bytes) -> None:
        parts, admitted = self._parts, self._admitted
        assert parts is not None and admitted is not None
        chunks = self._chunks
        if chunks is not None:
            try:
                data = chunks.feed(data)
            except Malformed as error:
                self._deny_and_close(Denied(error.status, error.code, error.message))
                return
            whole, rest = chunks.done, chunks.rest
        else:
            rest = data[self._missing :]
            data = data[: self._missing]
            self._missing -= len(data)
            whole = not self._missing
        parts.append(data)
        self._received += len(data)
        if self._received > http1.BODY_BYTES_MAX:
            self._deny_and_close(Denied(413, "invalid_request", _too_large()))
            return
        if whole:
            self._parts = self._chunks = None
            self._buffer = rest
            self._serve(admitted, b"".join(parts))

    # --- and is served ---

    def _serve(self, admitted: Admitted, body: bytes) -> None:
        hub = self._hub
        if admitted.operation is None:
            self._answer_models(admitted)
            return
        try:
            ask = openai.read_ask(body)
            lane = admitted.site.lanes.get(ask.model)
            if lane is None or (admitted.key.models and ask.model not in admitted.key.models):
                raise Denied(404, "model_not_found", _no_model(ask.model, admitted), "model")
            judgement = ALLOWED if admitted.site.rules.is_empty else judge(hub, admitted, ask, body)
        except InvalidBody as error:
            self._deny(Denied(400, error.code, error.message, error.param, admitted.answer_headers))
            return
        except Denied as denied:
            denied.extra = admitted.answer_headers
            self._deny(denied)
            return
        if admitted.raw:
            self.keep_alive = self.keep_alive and not ask.stream
        self.deadline_s = inf
        conversation = self.conversation = Conversation(hub, self, admitted, lane, ask)
        if judgement is not ALLOWED:
            conversation.judgement = judgement
        conversation.start(body, hub.next_id())

    def _answer_models(self, admitted: Admitted) -> None:
        name = admitted.path.removeprefix(openai.MODELS_PATH).removeprefix(b"/").decode("ascii", "replace")
        allowed = [model for model in admitted.site.lanes if not admitted.key.models or model in admitted.key.models]
        if name and name not in allowed:
            self._deny(Denied(404, "model_not_found", _no_model(name, admitted), "model"), no_body=admitted.no_body)
            return
        body = openai.model_body(name, "fleetgate") if name else openai.models_body(dict.fromkeys(allowed, "fleetgate"))
        self._write_plain(200, body, admitted.answer_headers, admitted.no_body)
        self.ended(self._hub.clock())

    def ended(self, now_s: float) -> None:
        """The answer is written: wait for the next request, or close."""
        self.conversation = None
        if self.closing:
            return
        if not self.keep_alive:  # while draining, whoever was told so; others may have sent their next request already
            self.closing = True
            self.transport.close()
            return
        self.deadline_s = now_s + IDLE_MAX_S
        self._go_on()

    def _go_on(self) -> None:
        """Turn to the next request, but not before the client has read most of the last answer: they would pile up."""
        if self._unread or self.closing:
            return
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        if self._buffer:
            self._hub.loop.call_soon(self._next)

    @property
    def busy(self) -> bool:
        """Whether a request or an answer is under way, in either direction."""
        coming = self.conversation is not None or self._parts is not None or bool(self._buffer)
        return coming or self.transport.get_write_buffer_size() > 0

    def close_if_idle(self) -> None:
        """Close when no request is under way: the worker is going."""
        if not self.busy:
            self.closing = True
            self.transport.close()

    def _next(self) -> None:
        if self.conversation is None and not self.closing and not self._unread and self._buffer:
            data, self._buffer = self._buffer, b""
            self._read_head(data)

    # --- errors ---

    def _deny(self, denied: Denied, no_body: bool = False) -> None:
        hub = self._hub
        hub.record_denied(denied.status, denied.code)
        if denied.status == 204:
            tail = b"" if self.keep_alive else b"connection: close\r\n"
            head = http1.status_line(204) + hub.date_line + denied.extra + tail
            self.transport.write(head + b"\r\n")
        else:
            body = openai.error_body(denied.status, denied.code, denied.message, denied.param)
            self._write_plain(denied.status, body, denied.extra, no_body)
        self.ended(hub.clock())

    def _deny_and_close(self, denied: Denied) -> None:
        """Answer, then close: after a framing error or with a body unread, the next byte cannot be trusted."""
        self.keep_alive = False
        self._parts = self._chunks = None
        self._hub.record_denied(denied.status, denied.code)
        body = openai.error_body(denied.status, denied.code, denied.message, denied.param)
        self._write_plain(denied.status, body, denied.extra, False)
        # What still comes is read and dropped for a moment: closing on unread bytes would reset the connection and
        # could take the answer with it. FAULTS.md row 31.
        self.closing = True
        self._received = 0
        self.deadline_s = self._hub.clock() + LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _write_plain(self, status: int, body: bytes, extra: bytes, no_body: bool) -> None:
        hub = self._hub
        if hub.draining:
            self.keep_alive = False
        if not self.keep_alive:
            extra += b"connection: close\r\n"
        data = answers.plain(status, body, hub.date_line, hub.next_id(), extra)
        self.transport.write(data[: -len(body)] if no_body else data)

    def overdue(self, now_s: float) -> None:
        """The sweep found `deadline_s` passed."""
        if self.conversation is not None:
            return
        waits_for_request = self._parts is not None or bool(self._buffer)
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes not in (0, self._unsent_bytes):  # slow, but reading
            self._unsent_bytes = unsent_bytes
            self.deadline_s = now_s + UNREAD_MAX_S
        elif unsent_bytes:
            self.transport.abort()
        elif self.closing or not waits_for_request:
            self.closing = True
            self.transport.close()
        else:
            self._deny_and_close(Denied(408, "invalid_request", "the request did not arrive in time"))


def _too_large() -> str:
    return f"the request body is over {http1.BODY_BYTES_MAX // (1024 * 1024)} MiB"


def _no_model(name: str, admitted: Admitted) -> str:
    known = [model for model in sorted(admitted.site.lanes) if not admitted.key.models or model in admitted.key.models]
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    return f"the model {name[:200]!r} does not exist here or this key may not use it; there are: {shown or 'none'}"
