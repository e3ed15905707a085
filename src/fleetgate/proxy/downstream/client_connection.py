"""The client's side of a connection: strict framing in, one request at a time, answers in order."""

import asyncio
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

from fleetgate.core.routing.policy_decision import ALLOWED
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols import http1
from fleetgate.protocols.clients import openai
from fleetgate.protocols.clients.openai import InvalidBody
from fleetgate.protocols.http1 import ChunkedBody, HeadMemo, Malformed
from fleetgate.proxy.downstream.half_close import HalfCloseDetector
from fleetgate.proxy.downstream.idempotency import IdempotentReplay, claim
from fleetgate.proxy.downstream.policy_filter import evaluate_policies
from fleetgate.proxy.downstream.request_authorizer import RequestContext, RequestRejected, authorize
from fleetgate.proxy.request import response_heads as answers
from fleetgate.proxy.request.handler import RequestHandler
from fleetgate.proxy.transport import tcp_info as tcp

if TYPE_CHECKING:
    from fleetgate.proxy.worker.services import Hub

HEAD_WAIT_MAX_S = 10.0  # FAULTS.md row 4
BODY_GRACE_S = 5.0  # a body may be late by this much at first, by the other later; FAULTS.md row 4
BODY_SLACK_MAX_S = 15.0  # a mobile client's gap of some seconds is no attack
BODY_BYTES_PER_S_MIN = 1024
IDLE_MAX_S = 75.0  # longer than what load balancers in front usually keep
LINGER_S = 1.0
PIPELINED_BYTES_MAX = 64 * 1024
WRITE_BUFFER_BYTES_MAX = 256 * 1024  # FAULTS.md row 5
UNREAD_MAX_S = 60.0  # without the client taking a byte; FAULTS.md row 5
TOO_MANY_OF_KEY = errors.TOO_MANY_CONNECTIONS_OF_KEY.filled()
MISTAKE = errors.INTERNAL_ERROR
_TOO_LARGE = errors.BODY_TOO_LARGE.filled(mib=http1.BODY_BYTES_MAX // (1024 * 1024))
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    """One client connection. The sweep looks at `deadline_s`; no timer is ever set."""

    __slots__ = (
        "_admitted",
        "_buffer",
        "_chunks",
        "_held_bytes",
        "_hub",
        "_leaving",
        "_memo",
        "_missing",
        "_parts",
        "_paused",
        "_rated_bytes",
        "_received",
        "_remembered",
        "_slack_s",
        "_unread",
        "_unsent_bytes",
        "address",
        "closing",
        "conversation",
        "deadline_s",
        "keep_alive",
        "key",
        "transport",
    )

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub
        self.transport: asyncio.Transport
        self._buffer = b""
        self._memo = HeadMemo()
        self._remembered: RequestContext | None = None  # what the head in `_memo` led to; the two change together
        self._admitted: RequestContext | None = None  # of the body that is still coming
        self._parts: list[bytes] | None = None  # a body that is still coming
        self._missing = 0
        self._received = 0
        self._chunks: ChunkedBody | None = None
        self._paused = False  # reading, while a request is served
        self._unread = False  # the client is behind with reading what it was sent
        self._unsent_bytes = 0  # at the last look
        self._leaving: HalfCloseDetector | None = None  # since its FIN
        self._rated_bytes = 0  # of the body, at the last look at its pace
        self._slack_s = 0.0  # how long the body may go on coming too slowly
        self._held_bytes = 0  # of the budget for bodies
        self.key = ""  # whose connection it is counted as
        self.address = ""  # where it is counted as coming from
        self.conversation: RequestHandler | None = None
        self.keep_alive = True
        self.closing = False
        self.deadline_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self.deadline_s = self._hub.clock() + HEAD_WAIT_MAX_S
        self._hub.connected(self)
        refusal = self._hub.guards.greet(self)
        if refusal is not None:
            self._deny_and_close(refusal)

    def connection_lost(self, error: Exception | None) -> None:
        self._hub.disconnected(self)
        self._hub.guards.left(self)
        self._release_body()
        self.closing = True
        conversation, self.conversation = self.conversation, None
        if conversation is not None:
            conversation.client_gone()

    def eof_received(self) -> bool:
        """A FIN. If an answer is due, `HalfCloseDetector` finds out whether the client waits. FAULTS.md rows 41, 42."""
        # Over TLS nothing can be sent after it that would tell the two apart.
        if not self.is_due or self.transport.get_extra_info("sslcontext") is not None:
            return False
        if self._leaving is None:
            self._leaving = HalfCloseDetector(self, self._hub.loop)
        return True

    @property
    def is_due(self) -> bool:
        """Whether a whole request still waits for its answer."""
        waits = self._parts is None and http1.HEAD_END in self._buffer
        return not self.closing and (self.conversation is not None or waits)

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
        try:
            self._take(data)
        except Exception as error:  # FAULTS.md row 75: told with its place, answered, and only this client's matter
            self._hub.guards.mishap(error, self)

    def _take(self, data: bytes) -> None:
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

    def _read_head(self, data: bytes) -> None:
        known = self._remembered
        if known is not None and known.tables is self._hub.tables:
            end, length = self._memo.recall(data)
            if end:
                self._buffer = b""
                self._begin(known, length, data[end:])
                return
        data = http1.without_empty_lines(data)
        end = data.find(http1.HEAD_END)
        if (len(data) if end < 0 else end) > http1.HEAD_BYTES_MAX:
            self._deny_and_close(RequestRejected(*errors.HEAD_TOO_LARGE.filled(bytes_max=http1.HEAD_BYTES_MAX)))
            return
        if end < 0:
            if data and not self._buffer:  # the first head's time runs since the connection was made
                self.deadline_s = min(self.deadline_s, self._hub.clock() + HEAD_WAIT_MAX_S)
            self._buffer = data
            if self._leaving is not None:
                self.transport.close()  # the rest of it will not come
            return
        self._buffer = b""
        self._read_new_head(data[: end + 4], data[end + 4 :])

    def _read_new_head(self, head: bytes, rest: bytes) -> None:
        self._remembered = None
        try:
            parsed = http1.parse_request_head(head)
        except Malformed as error:
            self._deny_and_close(RequestRejected(error.status, error.code, error.message))
            return
        self.keep_alive = parsed.keep_alive
        try:
            admitted = authorize(parsed, self._hub)
        except RequestRejected as denied:
            if not parsed.chunked and max(parsed.content_length, 0) <= len(rest):
                self._buffer = rest[max(parsed.content_length, 0) :]
                self._deny(denied, no_body=parsed.method == b"HEAD")
            else:
                self._deny_and_close(denied, no_body=parsed.method == b"HEAD")
            return
        if not self._hub.guards.carries(self, admitted.key.name):
            self._deny_and_close(RequestRejected(*TOO_MANY_OF_KEY, extra=admitted.answer_headers))
            return
        lasting = not (admitted.key.expires_s or admitted.key.require_fresh_s)
        if lasting and parsed.keep_alive and not parsed.expects_continue and self._memo.keep(head):
            self._remembered = admitted
        if parsed.chunked:
            self._chunks = ChunkedBody()
        self._begin(admitted, 0 if parsed.content_length < 0 else parsed.content_length, rest)

    def _begin(self, admitted: RequestContext, length: int, rest: bytes) -> None:
        if length > http1.BODY_BYTES_MAX:
            self._deny_and_close(RequestRejected(*_TOO_LARGE))
            return
        guards = self._hub.guards
        if guards.shed_share and guards.sheds():
            self._deny_and_close(guards.refusal())
            return
        if self._chunks is None and length <= len(rest):
            self._buffer = rest[length:]
            self._serve(admitted, rest[:length])
            return
        if self._leaving is not None:
            self.transport.close()  # the rest of it will not come
            return
        if not self._hold_body(length):
            return
        self._pending(admitted, length)
        if admitted.head.expects_continue and not rest:
            self.transport.write(_CONTINUE)
        if rest:
            self._more_body(rest)

    def _pending(self, admitted: RequestContext, length: int) -> None:
        self._admitted = admitted
        self._parts = []
        self._received = 0
        self._missing = length
        self._slack_s = BODY_GRACE_S
        self._rated_bytes = 0
        self.deadline_s = self._hub.clock() + 1.0

    def _hold_body(self, more_bytes: int) -> bool:
        """Take bytes from the budget for bodies, or refuse the request."""
        if self._hub.guards.hold_body(more_bytes):
            self._held_bytes += more_bytes
            return True
        self._deny_and_close(self._hub.guards.refusal())
        return False

    def _release_body(self) -> None:
        if self._held_bytes:
            self._hub.guards.release_body(self._held_bytes)
            self._held_bytes = 0

    def _more_body(self, data: bytes) -> None:
        parts, admitted = self._parts, self._admitted
        assert parts is not None and admitted is not None
        chunks = self._chunks
        if chunks is not None:
            try:
                data = chunks.feed(data)
            except Malformed as error:
                self._deny_and_close(RequestRejected(error.status, error.code, error.message))
                return
            whole, rest = chunks.done, chunks.rest
            if not self._hold_body(len(data)):
                return
        else:
            rest = data[self._missing :]
            data = data[: self._missing]
            self._missing -= len(data)
            whole = not self._missing
        parts.append(data)
        self._received += len(data)
        if self._received > http1.BODY_BYTES_MAX:
            self._deny_and_close(RequestRejected(*_TOO_LARGE))
            return
        if whole:
            self._parts = self._chunks = None
            self._buffer = rest
            if admitted.tables is not self._hub.tables or admitted.key.expires_s:
                try:  # its key may be gone by now: FAULTS.md row 64
                    admitted = authorize(admitted.head, self._hub)
                except RequestRejected as denied:
                    self._deny(denied)
                    return
            self._serve(admitted, b"".join(parts))

    # --- and is served ---

    def _serve(self, admitted: RequestContext, body: bytes) -> None:
        hub = self._hub
        if admitted.operation is None:
            self._answer_models(admitted)
            return
        try:
            ask = openai.read_request(body)
            lane = admitted.site.lanes.get(ask.model)
            if lane is None or (admitted.key.models and ask.model not in admitted.key.models):
                raise RequestRejected(*_no_model(ask.model, admitted), "model")
            judgement = ALLOWED if admitted.site.rules.is_empty else evaluate_policies(hub, admitted, ask, body)
            claimed = claim(hub, admitted, body) if admitted.idempotency else None
        except InvalidBody as error:
            self._deny(RequestRejected(400, error.code, error.message, error.param, admitted.answer_headers))
            return
        except RequestRejected as denied:
            denied.extra += admitted.answer_headers
            self._deny(denied)
            return
        if isinstance(claimed, IdempotentReplay):
            hub.record_denied(200, "replayed")
            extra = claimed.headers + admitted.answer_headers + b"idempotent-replayed: true\r\n"
            self._write_plain(200, claimed.body, extra, no_body=False)
            self.ended(hub.clock())
            return
        if admitted.raw:
            self.keep_alive = self.keep_alive and not ask.stream
        self.deadline_s = inf
        conversation = self.conversation = RequestHandler(hub, self, admitted, lane, ask)
        if judgement is not ALLOWED:
            conversation.judgement = judgement
        if claimed is not None:
            conversation.claim = claimed
        conversation.start(body, hub.next_id())

    def _answer_models(self, admitted: RequestContext) -> None:
        name = admitted.path.removeprefix(openai.MODELS_PATH).removeprefix(b"/").decode("ascii", "replace")
        allowed = [model for model in admitted.site.lanes if not admitted.key.models or model in admitted.key.models]
        if name and name not in allowed:
            self._deny(RequestRejected(*_no_model(name, admitted), "model"), no_body=admitted.no_body)
            return
        body = openai.model_body(name, "fleetgate") if name else openai.models_body(dict.fromkeys(allowed, "fleetgate"))
        self._write_plain(200, body, answers.JSON + admitted.answer_headers, admitted.no_body)
        self.ended(self._hub.clock())

    def ended(self, now_s: float) -> None:
        """The answer is written: wait for the next request, or close."""
        self.conversation = None
        if self._held_bytes:
            self._release_body()
        if self.closing:
            return
        left = self._leaving is not None and not self._buffer
        if left or not self.keep_alive:  # while draining, whoever was told so; others may have sent their next request
            self.closing = True
            self.deadline_s = now_s + UNREAD_MAX_S  # a close waits for what is unsent, and nobody may read it
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
    def unread(self) -> bool:
        """Whether the client is behind with reading what it was sent."""
        return self._unread

    @property
    def is_new(self) -> bool:
        """Whether its first request is still to come."""
        return self._remembered is None

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

    def _deny(self, denied: RequestRejected, no_body: bool = False) -> None:
        self._write_denied(denied, no_body)
        self.ended(self._hub.clock())

    def _deny_and_close(self, denied: RequestRejected, no_body: bool = False) -> None:
        """Answer, then close: after a framing error or with a body unread, the next byte cannot be trusted."""
        self.keep_alive = False
        self._parts = self._chunks = None
        self._write_denied(denied, no_body)
        self._linger()

    def _write_denied(self, denied: RequestRejected, no_body: bool) -> None:
        hub = self._hub
        hub.record_denied(denied.status, denied.code)
        if denied.status == 204:
            tail = b"" if self.keep_alive else b"connection: close\r\n"
            head = http1.status_line(204) + hub.date_line + denied.extra + tail
            self.transport.write(head + b"\r\n")
        else:
            body = openai.error_body(denied.status, denied.code, denied.message, denied.param)
            self._write_plain(denied.status, body, answers.JSON + denied.extra, no_body)

    def _linger(self) -> None:
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

    def fail(self, request_id: bytes, put_away: Callable[[RequestHandler], None]) -> None:
        """A mistake of ours ended the request: say so if nothing was said yet, and never let it look whole."""
        was_closing, self.closing = self.closing, True  # what is put away must not begin the next request
        conversation = self.conversation
        if conversation is not None:
            put_away(conversation)  # first, so that its place is free when the client hears of it
        self.conversation = self._parts = self._chunks = None
        if was_closing or self.transport.is_closing():
            return
        hub = self._hub
        hub.record_denied(500, "internal_error")
        if conversation is None or not conversation.written:
            body = openai.error_body(MISTAKE.status, MISTAKE.code, MISTAKE.message)
            self.transport.write(
                answers.plain(500, body, hub.date_line, request_id, answers.JSON + b"connection: close\r\n")
            )
        elif conversation.request.raw:
            self.transport.abort()  # to HTTP/1.0 a regular close would be a good end
            return
        elif conversation.ask.stream:
            self.transport.write(http1.chunk(openai.error_event(MISTAKE.code, MISTAKE.message)))
        self._linger()

    def overdue(self, now_s: float) -> None:
        """The sweep found `deadline_s` passed."""
        if self.conversation is not None:
            return
        if self._parts is not None and not self.closing and self._is_body_fast_enough(now_s):
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
            self._deny_and_close(RequestRejected(*errors.REQUEST_TOO_SLOW.filled()))

    def _is_body_fast_enough(self, now_s: float) -> bool:
        passed_s = now_s - self.deadline_s + 1.0
        came_bytes, self._rated_bytes = self._received - self._rated_bytes, self._received
        self._slack_s = min(self._slack_s + came_bytes / BODY_BYTES_PER_S_MIN - passed_s, BODY_SLACK_MAX_S)
        self.deadline_s = now_s + 1.0
        return self._slack_s >= 0

    def still_reads(self, now_s: float) -> float:
        """A stream's client took nothing for long, as far as the worker sees: leave it, or say until when it may go on.

        Behind what the worker holds, the kernel holds some too, and it may have been taken from that.
        """
        link = tcp.read_tcp_info(self.transport)
        acked_bytes = link.acked_bytes if link is not None else 0
        if acked_bytes in (0, self._unsent_bytes):
            self.transport.abort()
        self._unsent_bytes = acked_bytes
        return now_s + UNREAD_MAX_S


def _no_model(name: str, admitted: RequestContext) -> tuple[int, str, str]:
    known = [model for model in sorted(admitted.site.lanes) if not admitted.key.models or model in admitted.key.models]
    shown = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    return errors.MODEL_UNKNOWN.filled(model=name[:200], available=shown or "none")
