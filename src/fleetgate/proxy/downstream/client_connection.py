"""Client connections: strict framing of requests, one at a time, and responses in their order."""

import asyncio
from collections.abc import Callable
from math import inf

from fleetgate.protocols import error_codes as errors
from fleetgate.protocols import http1
from fleetgate.protocols.http1 import ChunkedBody, HeadMemo, Malformed
from fleetgate.proxy.downstream.connection_limits import ConnectionLimits
from fleetgate.proxy.downstream.half_close import COMMENT, HalfCloseDetector, ResponseStart
from fleetgate.proxy.downstream.incoming_body import IncomingBody
from fleetgate.proxy.downstream.local_responses import DEFAULT_PROTOCOL, LocalResponder, RequestRejected
from fleetgate.proxy.downstream.request_authorizer import RequestAuthorizer
from fleetgate.proxy.downstream.request_intake import LocalResponse, RequestIntake
from fleetgate.proxy.request.request_context import RequestContext
from fleetgate.proxy.request.response.in_flight import InFlightRequest, RequestFactory
from fleetgate.proxy.transport import tcp_info

HEAD_WAIT_MAX_S = 10.0  # faults.md row 4
IDLE_MAX_S = 75.0  # longer than load balancers usually keep idle connections
LINGER_S = 1.0
PIPELINED_BYTES_MAX = 64 * 1024
WRITE_BUFFER_BYTES_MAX = 256 * 1024  # faults.md row 5
UNREAD_MAX_S = 60.0  # without the client taking a byte; faults.md row 5
TOO_MANY_OF_KEY = errors.TOO_MANY_CONNECTIONS_OF_KEY.filled()
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOO_LARGE = errors.BODY_TOO_LARGE.filled(mib=http1.BODY_BYTES_MAX // (1024 * 1024))


class ConnectionServices:
    """The services that client connections of one worker use."""

    __slots__ = ("authorizer", "intake", "limits", "new_request", "on_error", "responder")

    def __init__(
        self,
        limits: ConnectionLimits,
        authorizer: RequestAuthorizer,
        intake: RequestIntake,
        responder: LocalResponder,
        new_request: RequestFactory,
        on_error: Callable[[BaseException, bytes], None],
    ) -> None:
        self.limits = limits
        self.authorizer = authorizer
        self.intake = intake
        self.responder = responder
        self.new_request = new_request
        self.on_error = on_error


class ClientConnection(asyncio.Protocol):
    """One client connection. The ticker checks `deadline_s` once a second; no timer is ever set."""

    __slots__ = (
        "_body",
        "_buffer",
        "_clock",
        "_half_close",
        "_held_bytes",
        "_lingered_bytes",
        "_loop",
        "_memo",
        "_paused",
        "_remembered",
        "_request",
        "_services",
        "_start",
        "_transport",
        "_unsent_bytes",
        "closing",
        "deadline_s",
        "is_behind",
        "keep_alive",
        "write",
    )

    def __init__(self, services: ConnectionServices, loop: asyncio.AbstractEventLoop) -> None:
        self._services = services
        self._loop = loop
        self._clock = loop.time
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], None]  # of the transport: a call less for each event
        self._buffer = b""
        self._memo = HeadMemo()
        self._remembered: RequestContext | None = None  # of the head in `_memo`; the two change together
        self._body: IncomingBody | None = None  # not complete yet
        self._request: InFlightRequest | None = None
        self._paused = False  # reading, while a request is served
        self._unsent_bytes = 0  # at the last check
        self._lingered_bytes = 0  # read and dropped while closing
        self._half_close: HalfCloseDetector | None = None  # since the client's FIN
        self._start: ResponseStart | None = None
        self._held_bytes = 0  # of the budget for bodies
        self.is_behind = False  # the client reads slower than data is sent
        self.keep_alive = True
        self.closing = False
        self.deadline_s = 0.0

    # --- calls of the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.write = self._transport.write
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self.deadline_s = self._clock() + HEAD_WAIT_MAX_S
        rejected = self._services.limits.connected(self)
        if rejected is not None:
            self._reject_and_close(rejected)

    def connection_lost(self, error: Exception | None) -> None:
        self._services.limits.disconnected(self)
        self._release_body()
        self.closing = True
        request, self._request = self._request, None
        if request is not None:
            self._guarded(request.client_gone, request.id)

    def eof_received(self) -> bool:
        """The client sent a FIN. If a response is due, detect whether it still reads. faults.md rows 41, 42."""
        # Over TLS nothing can be sent afterwards that would show the difference.
        if not self.is_response_due or self._transport.get_extra_info("sslcontext") is not None:
            return False
        if self._half_close is None:
            self._half_close = HalfCloseDetector(self, self._transport, self._loop)
        return True

    def pause_writing(self) -> None:
        self.is_behind = True
        if self._request is not None:
            self._guarded(self._request.pause, self._request.id)

    def resume_writing(self) -> None:
        self.is_behind = False
        if self._request is not None:
            self._guarded(self._request.resume, self._request.id)
        else:
            self._next_soon()

    def data_received(self, data: bytes) -> None:
        try:
            if self.closing:
                self._lingered_bytes += len(data)
                if self._lingered_bytes > PIPELINED_BYTES_MAX:
                    self._transport.abort()
            elif self._body is not None:
                self._more_body(self._body, data)
            elif self._request is not None or self.is_behind:
                self._buffer += data
                if len(self._buffer) > PIPELINED_BYTES_MAX and not self._paused:
                    self._paused = True
                    self._transport.pause_reading()
            else:
                self._read_head(self._buffer + data if self._buffer else data)
        except Exception as error:  # faults.md row 75: it ends this client's request alone
            self._on_error(error, b"")

    def _guarded(self, call: Callable[[], object], request_id: bytes) -> None:
        """An internal error ends this request alone."""
        try:
            call()
        except Exception as error:
            self._on_error(error, request_id)

    # --- reading a request ---

    def _read_head(self, data: bytes) -> None:
        known = self._remembered
        if known is not None and known.table is self._services.authorizer.active.current:
            end, length = self._memo.recall(data)
            if end:
                self._buffer = b""
                self._begin(known, length, None, data[end:])
                return
        data = http1.without_empty_lines(data)
        end = data.find(http1.HEAD_END)
        if (len(data) if end < 0 else end) > http1.HEAD_BYTES_MAX:
            too_large = errors.HEAD_TOO_LARGE.filled(bytes_max=http1.HEAD_BYTES_MAX)
            self._reject_and_close(RequestRejected(*too_large))
            return
        if end < 0:
            if data and not self._buffer:  # the first head's deadline runs from the start of the connection
                self.deadline_s = min(self.deadline_s, self._clock() + HEAD_WAIT_MAX_S)
            self._buffer = data
            if self._half_close is not None:
                self._transport.close()  # the rest of it will not come
            return
        self._buffer = b""
        self._read_new_head(data[: end + 4], data[end + 4 :])

    def _read_new_head(self, head: bytes, rest: bytes) -> None:
        self._remembered = None
        services = self._services
        try:
            parsed = http1.parse_request_head(head)
        except Malformed as error:
            self._reject_and_close(RequestRejected(error.status, error.code, error.message))
            return
        self.keep_alive = parsed.keep_alive
        length = max(parsed.content_length, 0)
        try:
            context = services.authorizer.authorize(parsed)
        except RequestRejected as rejected:
            if not parsed.chunked and length <= len(rest):
                self._buffer = rest[length:]
                self._reject(rejected, no_body=parsed.method == b"HEAD")
            else:
                self._reject_and_close(rejected, no_body=parsed.method == b"HEAD")
            return
        if not services.limits.admits_key(self, context.key.name):
            refusal = RequestRejected(*TOO_MANY_OF_KEY, extra=context.response_headers)
            self._reject_and_close(refusal)
            return
        is_lasting = not (context.key.expires_s or context.key.require_fresh_s)
        if is_lasting and parsed.keep_alive and not parsed.expects_continue and self._memo.keep(head):
            self._remembered = context
        self._begin(context, length, ChunkedBody() if parsed.chunked else None, rest)

    def _begin(self, context: RequestContext, length: int, chunks: ChunkedBody | None, rest: bytes) -> None:
        if length > http1.BODY_BYTES_MAX:
            self._reject_and_close(RequestRejected(*_TOO_LARGE))
            return
        limits = self._services.limits
        if limits.shed_share and limits.sheds():
            self._reject_and_close(limits.overloaded())
            return
        if chunks is None and length <= len(rest):
            self._buffer = rest[length:]
            self._serve(context, rest[:length])
            return
        if self._half_close is not None:
            self._transport.close()  # the rest of it will not come
            return
        if not self._hold_body(length):
            return
        self._body = IncomingBody(context, length, chunks)
        self.deadline_s = self._clock() + 1.0
        if context.head.expects_continue and not rest:
            self.write(_CONTINUE)
        if rest:
            self._more_body(self._body, rest)

    def _hold_body(self, more_bytes: int) -> bool:
        """Take bytes from the budget for bodies, or refuse the request."""
        limits = self._services.limits
        if limits.bodies.hold(more_bytes):
            self._held_bytes += more_bytes
            return True
        self._reject_and_close(limits.overloaded())
        return False

    def _release_body(self) -> None:
        if self._held_bytes:
            self._services.limits.bodies.release(self._held_bytes)
            self._held_bytes = 0

    def _more_body(self, body: IncomingBody, data: bytes) -> None:
        try:
            more_bytes = body.feed(data)
        except Malformed as error:
            self._reject_and_close(RequestRejected(error.status, error.code, error.message))
            return
        if body.is_chunked and not self._hold_body(more_bytes):
            return
        if body.received_bytes > http1.BODY_BYTES_MAX:
            self._reject_and_close(RequestRejected(*_TOO_LARGE))
            return
        if not body.is_whole:
            return
        self._body, self._buffer = None, body.rest
        context, authorizer = body.context, self._services.authorizer
        if context.table is not authorizer.active.current or context.key.expires_s:
            try:  # its key may be gone by now: faults.md row 64
                context = authorizer.authorize(context.head)
            except RequestRejected as rejected:
                self._reject(rejected)
                return
        self._serve(context, body.join())

    # --- serving it ---

    def _serve(self, context: RequestContext, body: bytes) -> None:
        services = self._services
        try:
            received = services.intake.receive(context, body)
        except RequestRejected as rejected:
            self._reject(rejected.spoken_in(context.protocol), no_body=context.no_body)
            return
        if isinstance(received, LocalResponse):
            self._answer(received, context.no_body)
            return
        if context.raw:
            self.keep_alive = self.keep_alive and not received.info.stream
        self.deadline_s = inf
        request = self._request = services.new_request(self, received)
        request.start()

    def _answer(self, response: LocalResponse, no_body: bool) -> None:
        responder = self._services.responder
        if response.code:
            responder.count(response.status, response.code)
        self.keep_alive = self.keep_alive and not responder.defaults.draining
        self.write(responder.plain(response.status, response.body, response.extra, self.keep_alive, no_body))
        self.ended(self._clock())

    def ended(self, now_s: float) -> None:
        """The response is written: wait for the next request, or close."""
        self._request = None
        if self._held_bytes:
            self._release_body()
        if self.closing:
            return
        has_left = self._half_close is not None and not self._buffer
        if has_left or not self.keep_alive:
            self.closing = True
            self.deadline_s = now_s + UNREAD_MAX_S  # a close waits for unsent data, which the client may never read
            self._transport.close()
            return
        self.deadline_s = now_s + IDLE_MAX_S
        if self._buffer or self._paused:
            self._next_soon()

    def _next_soon(self) -> None:
        """Begin the next request, once the client has read most of the last response: responses must not pile up."""
        if self.is_behind or self.closing:
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self._buffer:
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        if self._request is None and not self.closing and not self.is_behind and self._buffer:
            data, self._buffer = self._buffer, b""
            self._guarded(lambda: self._read_head(data), b"")

    # --- for limits and the worker ---

    @property
    def request(self) -> InFlightRequest | None:
        """The request in flight."""
        return self._request

    @property
    def client_address(self) -> str:
        """The client's address, without its port."""
        return str((self._transport.get_extra_info("peername") or ("",))[0])

    @property
    def is_busy(self) -> bool:
        """Whether a request or a response is under way."""
        is_coming = self._request is not None or self._body is not None or bool(self._buffer)
        return is_coming or self._transport.get_write_buffer_size() > 0

    @property
    def may_be_closed(self) -> bool:
        """Whether it has served a request and waits for the next one."""
        return self._remembered is not None and not self.closing and not self.is_busy

    def close_if_idle(self) -> None:
        """Close if no request is under way."""
        if not self.is_busy:
            self.closing = True
            self._transport.close()

    def close(self) -> None:
        """Close after all written data was sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close with a reset, so that an unfinished response does not look complete."""
        self._transport.abort()

    # --- a client that has sent a FIN ---

    @property
    def is_response_due(self) -> bool:
        """Whether the rest of a response is due."""
        waits = self._body is None and http1.HEAD_END in self._buffer
        return not self.closing and (self._request is not None or waits)

    @property
    def bytes_written(self) -> int:
        """Bytes of the current response that were sent, -1 without a request."""
        return self._request.writer.written if self._request is not None else -1

    def probe_start(self) -> None:
        """Send the next byte of the response's first bytes; the response is then written without them."""
        if self._start is None:
            self._start = ResponseStart(self._transport)
            self.write = self._write_started
        self._start.probe()

    def _write_started(self, data: bytes) -> None:
        start, self._start, self.write = self._start, None, self._transport.write
        if start is not None:
            start.write(data)

    def probe_stream(self) -> None:
        """Send a comment, if the response is a stream."""
        if self._request is not None and self._request.is_streaming:
            self._transport.write(self._request.writer.frame(COMMENT))

    # --- errors ---

    def _reject(self, rejected: RequestRejected, no_body: bool = False) -> None:
        responder = self._services.responder
        if responder.defaults.draining and rejected.status != 204:
            self.keep_alive = False
        self.write(responder.rejection(rejected, self.keep_alive, no_body))
        self.ended(self._clock())

    def _reject_and_close(self, rejected: RequestRejected, no_body: bool = False) -> None:
        """Respond, then close: after a framing error or an unread body the next byte has no known meaning."""
        self.keep_alive = False
        self._body = None
        self.write(self._services.responder.rejection(rejected, False, no_body))
        self._linger()

    def _linger(self) -> None:
        # Bytes that still come are read and dropped for a moment: a close with unread bytes would reset the connection
        # and could take the response with it. faults.md row 31.
        self.closing = True
        self._lingered_bytes = 0
        self.deadline_s = self._clock() + LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _on_error(self, error: BaseException, request_id: bytes) -> None:
        if not request_id:
            request_id = self._request.id if self._request is not None else self._services.responder.next_id()
        self._services.on_error(error, request_id)
        self.fail(request_id)

    def fail(self, request_id: bytes) -> None:
        """End a request after an internal error: with an error response, or so that it does not look complete."""
        was_closing, self.closing = self.closing, True  # ending it must not begin the next request
        request, self._request, self._body = self._request, None, None
        written = request.writer.written if request is not None else 0
        protocol = request.writer.protocol if request is not None else DEFAULT_PROTOCOL
        takes_event = request.fail() if request is not None else False  # first, so that its slot is free
        if was_closing or self._transport.is_closing():
            return
        responder = self._services.responder
        if not written:
            self.write(responder.internal_error(request_id, protocol))
        elif takes_event:
            self.write(responder.internal_error_event(protocol))
        else:
            responder.count(500, "internal_error")
            self._transport.abort()  # only an error event or a reset shows that the response is incomplete
            return
        self._linger()

    def tick(self, now_s: float) -> None:
        """Check `deadline_s`, once a second."""
        if self.deadline_s > now_s or self._request is not None:
            return
        body = self._body
        if body is not None and not self.closing and body.is_fast_enough(now_s - self.deadline_s + 1.0):
            self.deadline_s = now_s + 1.0
            return
        waits_for_request = body is not None or bool(self._buffer)
        unsent_bytes = self._transport.get_write_buffer_size()
        if unsent_bytes not in (0, self._unsent_bytes):  # slow, but reading
            self._unsent_bytes = unsent_bytes
            self.deadline_s = now_s + UNREAD_MAX_S
        elif unsent_bytes:
            self._transport.abort()
        elif self.closing or not waits_for_request:
            self.closing = True
            self._transport.close()
        else:
            self._reject_and_close(RequestRejected(*errors.REQUEST_TOO_SLOW.filled()))

    def next_read_deadline_s(self, now_s: float) -> float:
        """Abort if the client has read nothing since the last call. Returns the next deadline.

        The kernel holds some bytes behind what the worker holds, and the client may have taken from those.
        """
        info = tcp_info.read_tcp_info(self._transport)
        acked_bytes = info.acked_bytes if info is not None else 0
        if acked_bytes in (0, self._unsent_bytes):
            self._transport.abort()
        self._unsent_bytes = acked_bytes
        return now_s + UNREAD_MAX_S
