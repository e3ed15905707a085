"""The HTTP server of a simulated engine: an asyncio protocol, and one timer for all responses."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import httptools
import msgspec

from fleetgate.engine.batch import NEVER_S, Batch, Speeds, TokenSequence
from fleetgate.engine.metrics import EngineCounts, llamacpp_metrics, vllm_metrics
from fleetgate.engine.request_parser import (
    GenerationRequest,
    InvalidRequest,
    OutputDefaults,
    read_chat,
    read_completion,
    read_embedding,
    read_response,
    response_id,
)
from fleetgate.engine.response_formats import (
    ChatFormat,
    CompletionFormat,
    ResponseFormat,
    ResponsesFormat,
    embeddings_body,
)

BODY_BYTES_MAX = 32 * 1024 * 1024
PIPELINE_MAX = 64  # requests that may wait on one connection behind the current one
_TICK_S = 0.001  # the timers of the event loop have a resolution of 1 ms
_JSON_TYPE = b"application/json"
_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    413: b"Content Too Large",
    429: b"Too Many Requests",
    503: b"Service Unavailable",
}
_ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one simulated engine."""

    models: tuple[str, ...] = ("sim",)
    speeds: Speeds = Speeds()
    defaults: OutputDefaults = OutputDefaults()
    slots: int = 32
    queue_max: int = 1024
    style: str = "vllm"
    region: str = ""
    latency_s: float = 0.0
    startup_s: float = 0.0
    kv_tokens: int = 400_000
    api_key: str = ""


class EngineRefusal(Exception):
    """A request is refused with an error response."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


_Operation = tuple[
    Callable[[bytes, OutputDefaults], GenerationRequest], Callable[[GenerationRequest, str, int], ResponseFormat], str
]
_GENERATING: dict[bytes, _Operation] = {
    b"/v1/chat/completions": (read_chat, ChatFormat, "chatcmpl"),
    b"/v1/completions": (read_completion, CompletionFormat, "cmpl"),
    b"/v1/responses": (read_response, ResponsesFormat, "resp"),
}
_GETS = (b"/v1/models", b"/health", b"/metrics")


class EngineServer:
    """One simulated engine: its batch, its counters and the timer that drives every response."""

    def __init__(self, config: EngineConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.config = config
        self.loop = loop
        self.batch: Batch[EngineResponse] = Batch(config.speeds, config.slots, config.queue_max)
        self.counts = EngineCounts()
        self.ready_at_s = loop.time() + config.startup_s
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = NEVER_S
        self._responses = 0

    def next_number(self) -> int:
        """The next number for the id of a response."""
        self._responses += 1
        return self._responses

    @property
    def ready(self) -> bool:
        """True once the start-up time is over."""
        return self.loop.time() >= self.ready_at_s

    def submit(self, response: "EngineResponse") -> bool:
        """Begin a response; false if the queue is full."""
        accepted = self.batch.submit(response, self.loop.time())
        if accepted:
            self.advance()
        return accepted

    def cancel(self, response: "EngineResponse") -> None:
        """Cancel a response after its client disconnected."""
        self.counts.disconnects += 1
        self.batch.cancel(response, self.loop.time())
        self._arm()

    def advance(self) -> None:
        """Do the work that is due, and set the timer for the next token."""
        for response in self.batch.advance(self.loop.time()):
            response.write_tokens()
        self._arm()

    def _arm(self) -> None:
        next_s = self.batch.next_s
        if next_s == self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_s = next_s
        if next_s != NEVER_S:
            # Rounded up, because a timer that fires before the step is due must be set again.
            delay_s = max(_TICK_S, (int((next_s - self.loop.time()) / _TICK_S) + 1) * _TICK_S)
            self._timer = self.loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._timer_s = NEVER_S
        self.advance()


class EngineResponse(TokenSequence):
    """A sequence that writes its tokens to a connection."""

    __slots__ = ("_connection", "_format", "_request")

    def __init__(self, request: GenerationRequest, format_: ResponseFormat, connection: "Connection") -> None:
        super().__init__(request.prompt_tokens, len(request.pieces))
        self._request = request
        self._format = format_
        self._connection = connection

    def write_tokens(self) -> None:
        """Write the new tokens; the events of a step are one write."""
        if self._request.stream:
            self._write_events()
        elif self.finished:
            self._connection.engine.counts.finished(self._request.finish_reason)
            self._connection.respond(200, self._format.whole())

    def _write_events(self) -> None:
        connection, event = self._connection, self._format.event
        parts = []
        if self.sent == 0:
            connection.begin_stream()
            parts.append(self._format.first())
        parts += [event(piece) for piece in self._request.pieces[self.sent : self.made]]
        self.sent = self.made
        if self.finished:
            connection.engine.counts.finished(self._request.finish_reason)
            parts.append(self._format.last())
        connection.write_chunks([part for part in parts if part])
        if self.finished:
            connection.end_stream()


class _Request:
    __slots__ = ("authorization", "body", "expects", "keep_alive", "method", "path")

    def __init__(self) -> None:
        self.method = b""
        self.path = b""
        self.authorization = b""
        self.expects = False
        self.keep_alive = True
        self.body = b""


class Connection(asyncio.Protocol):
    """One client connection; its requests are served in order."""

    def __init__(self, engine: EngineServer) -> None:
        self.engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._request = _Request()
        self._parts: list[bytes] = []
        self._bytes = 0
        self._queue: deque[_Request] = deque()
        self._current: _Request | None = None
        self._response: EngineResponse | None = None
        self._region = b"x-engine-region: %b\r\n" % engine.config.region.encode() if engine.config.region else b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._queue.clear()
        response, self._response = self._response, None
        if response is not None and not response.finished:
            self.engine.cancel(response)
        elif self._current is not None:
            self.engine.counts.disconnects += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of this server, not of the client
        except httptools.HttpParserUpgrade:
            self._fail(
                EngineRefusal(400, "this server supports only HTTP/1.1; do not request an upgrade", "bad_request")
            )
        except httptools.HttpParserError as error:
            self._fail(EngineRefusal(400, f"the request is not HTTP/1.1: {error}", "bad_request"))

    # --- callbacks of the parser ---

    def on_message_begin(self) -> None:
        self._request = _Request()
        self._parts = []
        self._bytes = 0

    def on_url(self, url: bytes) -> None:
        self._request.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 6 and name.lower() == b"expect":
            self._request.expects = value.lower() == b"100-continue"
        elif len(name) == 13 and name.lower() == b"authorization":
            self._request.authorization = value

    def on_headers_complete(self) -> None:
        if self._request.expects and self._current is None and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._bytes += len(body)
        if self._bytes <= BODY_BYTES_MAX:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        if self._bytes > BODY_BYTES_MAX:
            self._fail(EngineRefusal(413, f"the body is over {BODY_BYTES_MAX} bytes", "too_large"))
        elif self._current is not None:
            self._queue.append(request)
            if len(self._queue) > PIPELINE_MAX and self._transport is not None:
                self._transport.abort()
        else:
            self._begin(request)

    # --- responding ---

    def _begin(self, request: _Request) -> None:
        self._current = request
        if self.engine.config.latency_s > 0:
            self.engine.loop.call_later(self.engine.config.latency_s, self._handle, request)
        else:
            self._handle(request)

    def _handle(self, request: _Request) -> None:
        if self._transport is None:
            return
        try:
            self._route(request)
        except EngineRefusal as refusal:
            self._refuse(refusal)
        except InvalidRequest as error:
            self._refuse(EngineRefusal(400, str(error), "invalid_request", error.param))

    def _route(self, request: _Request) -> None:
        path = request.path.partition(b"?")[0]
        operation = _GENERATING.get(path)
        if operation is None and path != b"/v1/embeddings" and path not in _GETS:
            raise EngineRefusal(404, f"the path {path.decode(errors='replace')} does not exist", "unknown_path")
        method = b"GET" if path in _GETS else b"POST"
        if request.method != method and not (method == b"GET" and request.method == b"HEAD"):
            raise EngineRefusal(405, f"use {method.decode()} here", "method_not_allowed")
        if path in _GETS:
            self._get(path)
            return
        self._check_access(request)
        if operation is None:
            self._embed(request)
        else:
            self._generate(request, operation)

    def _check_access(self, request: _Request) -> None:
        config = self.engine.config
        if config.api_key and request.authorization != b"Bearer " + config.api_key.encode():
            raise EngineRefusal(401, "the API key is missing or wrong", "invalid_api_key")
        if not self.engine.ready:
            raise EngineRefusal(503, "the model is loading; try again soon", "loading")

    def _get(self, path: bytes) -> None:
        engine = self.engine
        if path == b"/v1/models":
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "fleetgate"} for name in self._models]
            self.respond(200, msgspec.json.encode({"object": "list", "data": data}))
        elif path == b"/metrics":
            render = llamacpp_metrics if engine.config.style == "llamacpp" else vllm_metrics
            text = render(engine.batch, engine.counts, engine.config.models[0], engine.config.kv_tokens)
            self.respond(200, text.encode(), b"text/plain; version=0.0.4")
        elif engine.ready:
            self.respond(200, b'{"status":"ok"}')
        else:
            raise EngineRefusal(503, "the model is loading; try again soon", "loading")

    @property
    def _models(self) -> tuple[str, ...]:
        return self.engine.config.models

    def _check_model(self, name: str) -> None:
        if name not in self._models:
            raise EngineRefusal(404, f"the model {name!r} does not exist", "model_not_found", "model")

    def _embed(self, request: _Request) -> None:
        embedding = read_embedding(request.body)
        self._check_model(embedding.model)
        self.engine.batch.prompt_tokens_total += embedding.prompt_tokens
        self.respond(200, embeddings_body(embedding, self.engine.config.defaults.seed))

    def _generate(self, request: _Request, operation: _Operation) -> None:
        read, make_format, prefix = operation
        generation = read(request.body, self.engine.config.defaults)
        self._check_model(generation.model)
        name = response_id(prefix, self.engine.next_number(), request.body)
        response = EngineResponse(generation, make_format(generation, name, int(time.time())), self)
        self._response = response
        if not self.engine.submit(response):
            self._response = None
            self.engine.counts.refusals += 1
            status = 503 if self.engine.config.style == "llamacpp" else 429
            raise EngineRefusal(status, "every slot is in use and the queue is full; try again soon", "queue_full")

    def _refuse(self, refusal: EngineRefusal) -> None:
        kind = _ERROR_TYPES.get(refusal.status, "rate_limit_error" if refusal.status == 429 else "server_error")
        detail = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
        self.respond(refusal.status, msgspec.json.encode({"error": detail}))

    def _fail(self, refusal: EngineRefusal) -> None:
        """Respond to invalid HTTP and close: the framing of the connection is lost."""
        self._queue.clear()
        if self._transport is None:
            return
        if self._current is None:
            self._current = _Request()
            self._current.keep_alive = False
            self._refuse(refusal)
        else:
            self._transport.abort()

    # --- writing ---

    def _head(self, status: int, rest: bytes) -> bytes:
        close = b"" if self._current is None or self._current.keep_alive else b"connection: close\r\n"
        if status in (429, 503):
            close += b"retry-after: 1\r\n"
        return b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (status, _REASONS[status], self._region, close, rest)

    def respond(self, status: int, body: bytes, kind: bytes = _JSON_TYPE) -> None:
        """Write a whole response, and start the next request of the connection."""
        if self._transport is None:
            return
        head = self._head(status, b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(body)))
        sent = b"" if self._current is not None and self._current.method == b"HEAD" else body
        self._transport.write(head + sent)
        self._done()

    def begin_stream(self) -> None:
        """Write the head of a stream."""
        rest = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        if self._transport is not None:
            self._transport.write(self._head(200, rest + b"transfer-encoding: chunked\r\n"))

    def write_chunks(self, parts: list[bytes]) -> None:
        """Write events, one chunk each."""
        if self._transport is not None:
            self._transport.write(b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]))

    def end_stream(self) -> None:
        """Write the end of a stream, and start the next request of the connection."""
        if self._transport is not None:
            self._transport.write(b"0\r\n\r\n")
            self._done()

    def _done(self) -> None:
        request, self._current, self._response = self._current, None, None
        if self._transport is None:
            return
        if request is not None and not request.keep_alive:
            self._transport.close()
        elif self._queue:
            # Through the loop, so that a long pipeline does not build a deep stack.
            self._current = self._queue.popleft()
            self.engine.loop.call_soon(self._begin, self._current)
