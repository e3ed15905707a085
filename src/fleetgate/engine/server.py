"""The server around a simulated engine: HTTP at protocol level, one timer for all answers."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import httptools
import msgspec

from fleetgate.engine.batch import NEVER_S, Batch, Sequence, Speeds
from fleetgate.engine.metrics import EngineCounts, llamacpp_metrics, vllm_metrics
from fleetgate.engine.request_parser import (
    GenerationRequest,
    InvalidRequest,
    OutputHabits,
    answer_id,
    read_chat,
    read_completion,
    read_embedding,
    read_response,
)
from fleetgate.engine.response_formats import (
    ChatFormat,
    CompletionFormat,
    ResponseFormat,
    ResponsesFormat,
    embeddings_body,
)

BODY_BYTES_MAX = 32 * 1024 * 1024
PIPELINE_MAX = 64  # requests that may wait on one connection behind the one being answered
_TICK_S = 0.001  # the event loop's timers count whole milliseconds
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
    """How one simulated engine behaves."""

    models: tuple[str, ...] = ("sim",)
    speeds: Speeds = Speeds()
    habits: OutputHabits = OutputHabits()
    slots: int = 32
    queue_max: int = 1024
    style: str = "vllm"
    region: str = ""
    latency_s: float = 0.0
    startup_s: float = 0.0
    kv_tokens: int = 400_000
    api_key: str = ""


class EngineRefusal(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param


_Made = tuple[
    Callable[[bytes, OutputHabits], GenerationRequest], Callable[[GenerationRequest, str, int], ResponseFormat], str
]
_GENERATING: dict[bytes, _Made] = {
    b"/v1/chat/completions": (read_chat, ChatFormat, "chatcmpl"),
    b"/v1/completions": (read_completion, CompletionFormat, "cmpl"),
    b"/v1/responses": (read_response, ResponsesFormat, "resp"),
}
_GETS = (b"/v1/models", b"/health", b"/metrics")


class EngineServer:
    """One simulated engine: its batch, its counts and the timer that drives every answer."""

    def __init__(self, config: EngineConfig, loop: asyncio.AbstractEventLoop) -> None:
        self.config = config
        self.loop = loop
        self.batch: Batch[EngineResponse] = Batch(config.speeds, config.slots, config.queue_max)
        self.counts = EngineCounts()
        self.ready_at_s = loop.time() + config.startup_s
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = NEVER_S
        self._answers = 0

    def number(self) -> int:
        """The next number for an answer's id."""
        self._answers += 1
        return self._answers

    @property
    def ready(self) -> bool:
        """The start-up time is over."""
        return self.loop.time() >= self.ready_at_s

    def submit(self, answer: "EngineResponse") -> bool:
        """Begin an answer, or say no because the queue is full."""
        taken = self.batch.submit(answer, self.loop.time())
        if taken:
            self.turn()
        return taken

    def cancel(self, answer: "EngineResponse") -> None:
        """Give up an answer whose client is gone."""
        self.counts.disconnects += 1
        self.batch.cancel(answer, self.loop.time())
        self._arm()

    def turn(self) -> None:
        """Do what is due and set the timer for what comes next."""
        for answer in self.batch.advance(self.loop.time()):
            answer.tell()
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
            # Rounded up: a timer that fires before the step is due would only be set again.
            delay_s = max(_TICK_S, (int((next_s - self.loop.time()) / _TICK_S) + 1) * _TICK_S)
            self._timer = self.loop.call_later(delay_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._timer_s = NEVER_S
        self.turn()


class EngineResponse(Sequence):
    """A sequence that writes its tokens to a connection."""

    __slots__ = ("_ask", "_connection", "_reply")

    def __init__(self, ask: GenerationRequest, reply: ResponseFormat, connection: "Connection") -> None:
        super().__init__(ask.prompt_tokens, len(ask.pieces))
        self._ask = ask
        self._reply = reply
        self._connection = connection

    def tell(self) -> None:
        """Write what is new; a stream's events go out in one write for each step."""
        if self._ask.stream:
            self._tell_stream()
        elif self.finished:
            self._connection.engine.counts.finished(self._ask.finish_reason)
            self._connection.respond(200, self._reply.whole())

    def _tell_stream(self) -> None:
        connection, event = self._connection, self._reply.event
        parts = []
        if self.told == 0:
            connection.begin_stream()
            parts.append(self._reply.first())
        parts += [event(piece) for piece in self._ask.pieces[self.told : self.made]]
        self.told = self.made
        if self.finished:
            connection.engine.counts.finished(self._ask.finish_reason)
            parts.append(self._reply.last())
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
    """One client connection; requests on it are answered in order."""

    def __init__(self, engine: EngineServer) -> None:
        self.engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._request = _Request()
        self._parts: list[bytes] = []
        self._bytes = 0
        self._queue: deque[_Request] = deque()
        self._current: _Request | None = None
        self._answer: EngineResponse | None = None
        self._region = b"x-engine-region: %b\r\n" % engine.config.region.encode() if engine.config.region else b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._queue.clear()
        answer, self._answer = self._answer, None
        if answer is not None and not answer.finished:
            self.engine.cancel(answer)
        elif self._current is not None:
            self.engine.counts.disconnects += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a bug of ours, not of the client
        except httptools.HttpParserUpgrade:
            self._fail(EngineRefusal(400, "this server speaks HTTP/1.1 only; do not ask for an upgrade", "bad_request"))
        except httptools.HttpParserError as error:
            self._fail(EngineRefusal(400, f"the request is not HTTP/1.1: {error}", "bad_request"))

    # --- the parser's calls ---

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

    # --- answering ---

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
        made = _GENERATING.get(path)
        if made is None and path != b"/v1/embeddings" and path not in _GETS:
            raise EngineRefusal(404, f"there is no {path.decode(errors='replace')} here", "unknown_path")
        wanted = b"GET" if path in _GETS else b"POST"
        if request.method != wanted and not (wanted == b"GET" and request.method == b"HEAD"):
            raise EngineRefusal(405, f"use {wanted.decode()} here", "method_not_allowed")
        if path in _GETS:
            self._get(path)
            return
        self._check_may_work(request)
        if made is None:
            self._embed(request)
        else:
            self._generate(request, made)

    def _check_may_work(self, request: _Request) -> None:
        config = self.engine.config
        if config.api_key and request.authorization != b"Bearer " + config.api_key.encode():
            raise EngineRefusal(401, "the API key is missing or wrong", "invalid_api_key")
        if not self.engine.ready:
            raise EngineRefusal(503, "the model is being loaded; try again soon", "loading")

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
            raise EngineRefusal(503, "the model is being loaded; try again soon", "loading")

    @property
    def _models(self) -> tuple[str, ...]:
        return self.engine.config.models

    def _check_model(self, name: str) -> None:
        if name not in self._models:
            raise EngineRefusal(404, f"the model {name!r} does not exist here", "model_not_found", "model")

    def _embed(self, request: _Request) -> None:
        ask = read_embedding(request.body)
        self._check_model(ask.model)
        self.engine.batch.prompt_tokens_total += ask.prompt_tokens
        self.respond(200, embeddings_body(ask, self.engine.config.habits.seed))

    def _generate(self, request: _Request, made: _Made) -> None:
        read, reply, prefix = made
        ask = read(request.body, self.engine.config.habits)
        self._check_model(ask.model)
        name = answer_id(prefix, self.engine.number(), request.body)
        answer = self._answer = EngineResponse(ask, reply(ask, name, int(time.time())), self)
        if not self.engine.submit(answer):
            self._answer = None
            self.engine.counts.refusals += 1
            status = 503 if self.engine.config.style == "llamacpp" else 429
            raise EngineRefusal(status, "every slot is taken and the queue is full; try again soon", "queue_full")

    def _refuse(self, refusal: EngineRefusal) -> None:
        kind = _ERROR_TYPES.get(refusal.status, "rate_limit_error" if refusal.status == 429 else "server_error")
        detail = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
        self.respond(refusal.status, msgspec.json.encode({"error": detail}))

    def _fail(self, refusal: EngineRefusal) -> None:
        """Answer what cannot be understood and close: the connection's framing is lost."""
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
        """Write a whole answer and go on to the next request of the connection."""
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
        """Write events, each as a chunk of its own."""
        if self._transport is not None:
            self._transport.write(b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]))

    def end_stream(self) -> None:
        """Write the end of a stream and go on to the next request of the connection."""
        if self._transport is not None:
            self._transport.write(b"0\r\n\r\n")
            self._done()

    def _done(self) -> None:
        request, self._current, self._answer = self._current, None, None
        if self._transport is None:
            return
        if request is not None and not request.keep_alive:
            self._transport.close()
        elif self._queue:
            # Not called directly: a long pipeline must not become a deep stack.
            self._current = self._queue.popleft()
            self.engine.loop.call_soon(self._begin, self._current)
