"""One attempt's answer: read its head, peek until the first content event, relay the rest, judge the end.

The committed stream's fast path allocates nothing an event: one chunk that is one whole event with the mark of plain
content goes on as the same bytes object, once it is known to be JSON (0.3 µs). HOTPATH.md rules 2 and 3.
"""

from collections.abc import Callable
from time import time
from typing import Protocol

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.protocols import http1
from fleetgate.protocols.clients import openai
from fleetgate.protocols.clients.openai_events import status_of_error
from fleetgate.protocols.http1 import ChunkedBody, Malformed, ResponseHead, ResponseMemo
from fleetgate.protocols.json_checks import is_json, is_text
from fleetgate.protocols.messages import EventMeaning, Operation, Usage
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.protocols.sse import Events, EventTooLong, as_text, data_of, is_plain
from fleetgate.protocols.upstream_errors import failure_of, retry_after_s
from fleetgate.proxy.transport.body_drain import BodyDrain
from fleetgate.proxy.transport.connection_pool import UpstreamConnection

BODY_KEPT_BYTES_MAX = 8 * 1024 * 1024  # a whole answer is held back and checked up to this; DESIGN.md section 5
HELD_EVENTS_BYTES_MAX = 256 * 1024  # role events and comments before the first content; more is no answer
RETRY_AFTER_DEFAULT_S = 1.0

# What an answer may hold before its first content; it is kept until the request can no longer move.
_NOT_YET = frozenset({EventMeaning.OTHER, EventMeaning.USAGE, EventMeaning.COMMENT})
# How a content event begins that the fast path passes on.
_PLAIN_BEGINS = (b"data: {", b"event: response.output_text.delta\ndata: {")

_PASSED = (b"content-type", b"openai-processing-ms", b"openai-version", b"openai-model")


class AttemptListener(Protocol):
    """The conversation that an attempt belongs to."""

    def on_first(self, relay: "ResponseRelay") -> None:
        """The first content is here: commit, then take `relay.held`."""

    def on_failed(self, relay: "ResponseRelay", event: AttemptFailed) -> None:
        """The attempt is lost."""

    def on_stale(self, relay: "ResponseRelay") -> None:
        """A kept connection had been closed before this request reached it: nothing is known against the Endpoint."""

    def on_ended(self, relay: "ResponseRelay", tail: bytes) -> None:
        """The answer ended as it should. Its last bytes are the owner's to write, after it has settled its place:
        a client that asks again at once must not find that place still taken."""

    def write(self, data: bytes) -> None:
        """Send payload with its framing to the client."""

    def now_s(self) -> float:
        """The loop's clock."""


class ModelNames:
    """What an engine and its client call the model, as JSON strings; `mark` is how answers usually say the latter."""

    __slots__ = ("asked", "mark", "rename")

    def __init__(self, upstream: bytes, asked: bytes) -> None:
        self.asked = asked
        self.rename = None if upstream == asked else (upstream, asked)
        self.mark = b'"model":%b' % (asked if upstream == asked else upstream)


class ResponseRelay:
    """Reads one answer. `on_data` and `on_lost` are called by the connection that carries it."""

    # Class attributes are the defaults: most requests never touch most of them, and setting each costs.
    connection: UpstreamConnection | None = None
    head: ResponseHead | None = None
    status = 0
    stream = False
    paused = False  # the client reads slower than the upstream writes
    raw = False  # an HTTP/1.0 client: no chunked framing
    event_count = 0
    beats = 0  # reads that were not one plain event: comments and other signs of life
    dropped = 0
    finish_seen = False
    done_seen = False
    usage: Usage | None = None
    told: Usage | None = None  # of an answer that goes on, what its own engine says of its part
    inherited = 0  # events that another engine had said, and that this one was given as its prompt
    script: Transcript | None = None  # of a stream that could go on elsewhere
    wants_whole = False  # the client asked for no stream
    choices: dict[int, bool] | None = None  # of an answer that may have several: which have begun, and ended
    passed = b""  # header lines of the upstream that the client may see
    _buffer = b""
    _chunked: ChunkedBody | None = None
    _left = -1
    _closed = False
    held: list[bytes]
    _body: list[bytes]
    _events: Events

    def __init__(self, owner: AttemptListener, operation: Operation, hide_usage: bool, names: ModelNames) -> None:
        self.owner = owner
        self.operation = operation
        self.hide_usage = hide_usage
        self._names = names
        self._rename = names.rename
        self._state: Callable[[bytes], None] = self._read_head

    # --- what the connection reports ---

    def on_data(self, data: bytes) -> None:
        """Bytes came from the upstream."""
        try:
            self._state(data)
        except Malformed:
            self._fail(Failure.BAD_OUTPUT)
        except EventTooLong:
            self._fail(Failure.BAD_OUTPUT)

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended by itself."""
        connection, self.connection = self.connection, None
        if self._closed:
            return
        head = self.head
        delimited_by_close = head is not None and self._chunked is None and self._left < 0
        if self.finish():
            return
        if delimited_by_close and error is None:
            try:
                self._end_of_body()
            except Malformed:
                self._fail(Failure.BAD_OUTPUT)
        elif head is not None:
            self._fail(Failure.BROKEN if error is not None else Failure.BAD_OUTPUT)
        elif connection is not None and connection.served > 1 and not self._buffer:
            self.cancel()
            self.owner.on_stale(self)
        else:
            self._fail(Failure.BROKEN)

    def not_connected(self, failure: Failure) -> None:
        """There is no connection to send the request on."""
        if not self._closed:
            self._closed = True
            self.owner.on_failed(self, AttemptFailed(failure, sent=False))

    def finish(self) -> bool:
        """End an answer of which only usage and `[DONE]` may be missing; False where it is not that far."""
        if not self.finish_seen or not self.stream or self.choices is not None:
            return False
        self._events.partial = b""
        self._end_of_stream([])
        return True

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._closed

    def cancel(self) -> None:
        """Nobody wants the answer any more: close the connection, which frees the engine's slot."""
        self._closed = True
        self._state = _ignore  # a bound method of its own would keep this object alive until the collector comes
        if self.connection is not None:
            self.connection.drop()
            self.connection = None

    # --- head ---

    def _read_head(self, data: bytes) -> None:
        memo = self.connection.peer.memo if self.connection is not None else ResponseMemo()
        known = memo.recall(data) if not self._buffer else None
        if known is not None:
            head, end, self._left = known
            self.passed = memo.passed
            self._begin_body(head, data[end:])
            return
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        while data:
            end = data.find(http1.HEAD_END)
            if end < 0:
                if len(data) > http1.HEAD_BYTES_MAX:
                    raise Malformed(502, "the upstream's response head is too large")
                self._buffer = data
                return
            data = self._take_head(memo, data[: end + 4], data[end + 4 :])

    def _take_head(self, memo: ResponseMemo, head_bytes: bytes, rest: bytes) -> bytes:
        """Read one head; what is left when it was an interim one, else nothing."""
        head = http1.parse_response_head(head_bytes)
        self._left = head.content_length
        if head.status < 200:  # 100 Continue and its like are not passed on
            return rest
        failure = failure_of(head.status, head.headers)
        if failure is not None:
            self.head, self.status = head, head.status
            self._fail(failure, retry_after_s(head.headers, time()))
            return b""
        memo.keep(head_bytes, head)
        self.passed = memo.passed = _passed_headers(head.headers)
        self._begin_body(head, rest)
        return b""

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        self.head = head
        self.status = head.status
        if head.chunked:
            self._chunked = ChunkedBody()
        if head.event_stream:
            if self.wants_whole:  # its client could not read it, nor tell whether it is whole
                raise Malformed(502, "an event stream that nobody asked for")
            self.stream = True
            self.held = []
            self._events = Events()
            self._state = self._peek
            if rest or self._left == 0:
                self._peek(rest)
            return
        if head.status in (204, 304):
            self._left = 0
        if self._left == len(rest):  # most answers come in one read
            self._left = 0
            self._whole_body(rest)
            return
        self._body = []
        self._state = self._gather
        if rest:
            self._gather(rest)

    # --- framing ---

    def _payload(self, data: bytes) -> bytes:
        """Take the framing off. Afterwards `_whole` tells whether the body has ended."""
        if self._chunked is not None:
            return self._chunked.feed(data)
        if self._left >= 0:
            if len(data) > self._left:
                self._buffer = data[self._left :]  # bytes past the answer: not to be trusted, the connection goes
                data = data[: self._left]
            self._left -= len(data)
        return data

    def _whole(self) -> bool:
        return self._chunked.done if self._chunked is not None else self._left == 0

    # --- an answer that is not streamed ---

    def _gather(self, data: bytes) -> None:
        payload = self._payload(data)
        self._body.append(payload)
        self._left_kept(len(payload))
        if self._whole():
            self._end_of_body()

    def _left_kept(self, more: int) -> None:
        self.event_count += more  # of an answer that is not streamed, the bytes: what the stall watch looks at
        if self.event_count > BODY_KEPT_BYTES_MAX:
            if (self._chunked is None and self._left < 0) or not self.wants_whole:
                raise Malformed(502, "too much to check whether it is whole, or no stream where one was asked for")
            self.held, self._body = self._body, []
            self.owner.on_first(self)
            if not self._closed:
                self._state = self._pass_on
                self._write_held()

    def _pass_on(self, data: bytes) -> None:
        payload = self._payload(data)
        self.event_count += len(payload)
        if payload:
            self.owner.write(payload if self.raw else http1.chunk(payload))
        if self._whole():
            self._end_of_body()

    def _end_of_body(self) -> None:
        if self._state == self._gather:
            self._whole_body(b"".join(self._body))
        elif self._state == self._pass_on:
            self._finish(b"" if self.raw else http1.LAST_CHUNK)
        else:
            self._end_of_stream([])

    def _whole_body(self, body: bytes) -> None:
        if self.status < 300:
            if not body.isascii() and not is_text(body):
                raise Malformed(502, "the upstream's answer is not UTF-8")
            self.usage, is_error = openai.read_answer(body)
            if is_error:
                self._fail_as_told(body)
                return
            if not self.wants_whole and self.operation.name != "embeddings":  # SDKs would read a stream of nothing
                raise Malformed(502, "no stream where one was asked for")
            self._learn_name(body)
        if self._rename is not None:
            body = openai.rename_model(body, *self._rename)
        self.held = [body]
        self.finish_seen = True
        self.owner.on_first(self)  # keeps head and body for the end, which is now
        self._finish(b"")

    def _fail_as_told(self, body: bytes) -> None:
        """An error behind a status 200 counts as the status it names. FAULTS.md rows 22 and 24."""
        status = status_of_error(body)
        failure = failure_of(status, {})
        if failure is not None:
            self._fail(failure)
            return
        self.status, self.stream, self.held = status, False, [body]
        self.passed = b"content-type: application/json\r\n"
        self.finish_seen = True
        self.owner.on_first(self)
        self._finish(b"")

    # --- a stream before its first content ---

    def _peek(self, data: bytes) -> None:
        events = self._events.feed(self._payload(data))
        meaning: EventMeaning | None = None
        for position, event in enumerate(map(as_text, events)):
            meaning, usage = openai.classify_event(event)
            self.usage = usage or self.usage
            if meaning is EventMeaning.ERROR:
                self._fail_as_told(data_of(event) or b"")
                return
            if meaning is EventMeaning.DONE:
                break  # nothing was said: an empty stream, which may still move
            if meaning is EventMeaning.MALFORMED:
                self.dropped += 1
                continue
            if meaning is EventMeaning.USAGE and self.hide_usage:
                continue
            self._learn_name(event)
            if self.choices is not None:
                openai.note_choices(event, self.choices)
            if meaning in _NOT_YET:
                self.held.append(self._named(event))
                continue
            self.owner.on_first(self)
            if self._closed:
                return
            self._state = self._stream
            out, self.held = self.held, []
            self._take(events[position:], out)
            return
        if sum(map(len, self.held)) > HELD_EVENTS_BYTES_MAX:
            raise Malformed(502, "no content event among the first ones")
        if self._whole() or meaning is EventMeaning.DONE:
            self._fail(Failure.BAD_OUTPUT)  # an empty stream

    # --- a stream after it ---

    def _stream(self, data: bytes) -> None:
        if self._is_one_plain_event(data):
            self.event_count += 1
            self.owner.write(data)
            if self.script is not None:
                self.script.keep(data)
            return
        self.beats += 1
        self._take(self._events.feed(self._payload(data)), [])

    def _take(self, events: list[bytes], out: list[bytes]) -> None:
        try:
            self._sort(events, out)
        except Malformed:
            if out:  # what came whole before the fault is the client's
                self._write_events(out)
            raise
        if self.done_seen or self._whole():
            self._end_of_stream(out)
        elif out:
            self._write_events(out)

    def _write_events(self, events: list[bytes]) -> None:
        if self.script is not None:
            for event in events:
                self.script.keep(event)
        payload = b"".join(events)
        self.owner.write(payload if self.raw else http1.chunk(payload))

    def _is_one_plain_event(self, data: bytes) -> bool:
        """Whether a read is exactly one chunk that holds exactly one content event, and nothing is pending."""
        chunked = self._chunked
        if chunked is None or self.raw or self._rename is not None or not chunked.at_boundary or self._events.partial:
            return False
        line = data.find(b"\r\n", 0, 10)
        length = len(data) - line - 4
        brace = data.find(b"{", line)
        return (
            line > 0
            and data.find(b"\n", brace) == len(data) - 4
            and data.find(b"\r", line + 2)
            == len(data) - 2  # a CR is a line end too: two would be an event of their own
            and data.endswith(b"}\n\n\r\n")
            and data.startswith(_PLAIN_BEGINS, line + 2)
            and (data.isascii() or is_text(data))
            and data.find(self.operation.fast_mark, line) > 0
            and data[:line] == b"%x" % length
            and is_json(data[brace:-4])
        )

    def _sort(self, events: list[bytes], out: list[bytes]) -> None:
        """Put what the client shall see into `out`."""
        mark = self.operation.fast_mark
        for event in map(as_text, events):
            if event.find(mark) >= 0 and event.startswith(b"data: {") and is_plain(event):
                self.event_count += 1
                out.append(self._named(event))
                continue
            meaning, usage = openai.classify_event(event)
            self.usage = usage or self.usage
            if meaning is EventMeaning.MALFORMED:
                self.dropped += 1
                continue
            if meaning is EventMeaning.ERROR:
                raise Malformed(502, "the upstream reported an error in its stream")
            if meaning is EventMeaning.DONE:
                if not self.finish_seen:
                    raise Malformed(502, "[DONE] without any finish_reason")
                self.done_seen = True
                out.append(event)
                return  # what follows is nobody's
            if meaning is EventMeaning.FINISH:
                self.finish_seen = True
                self.event_count += 1
            elif meaning is EventMeaning.CONTENT:
                self.event_count += 1
            elif meaning is EventMeaning.USAGE and self.hide_usage:
                continue
            if self.choices is not None:
                openai.note_choices(event, self.choices)
                self.finish_seen = self.finish_seen and all(self.choices.values())
            out.append(self._named(event))

    def _end_of_stream(self, last: list[bytes]) -> None:
        if self._state == self._peek or not self.finish_seen or (self._events.partial and not self.done_seen):
            if last:
                self._write_events(last)
            self._fail(Failure.BAD_OUTPUT)
            return
        if not self.done_seen and self.operation.done_mark:
            last.append(b"data: [DONE]\n\n")
        tail = b"".join(last)
        if not self.raw:
            tail = (http1.chunk(tail) if tail else b"") + http1.LAST_CHUNK
        self._finish(tail)

    # --- ends ---

    def _learn_name(self, data: bytes) -> None:
        """Clients read the name they asked for, whatever the engine calls itself."""
        names = self._names
        if data.find(names.mark) < 0:  # `in` on bytes costs twice as much
            other = openai.other_model_name(data, names.asked)
            if other is not None:
                self._rename = (other, names.asked)

    def _named(self, event: bytes) -> bytes:
        return event if self._rename is None else openai.rename_model(event, *self._rename)

    def _write_held(self) -> None:
        payload, self.held = self._named(b"".join(self.held)), []
        self.owner.write(payload if self.raw else http1.chunk(payload))

    def _finish(self, tail: bytes) -> None:
        self._closed = True
        self._state = _ignore
        connection, self.connection = self.connection, None
        if connection is not None:
            head, chunked = self.head, self._chunked
            surplus = self._buffer or (chunked is not None and chunked.rest)
            good = head is not None and head.keep_alive and not surplus
            if self.paused:
                connection.transport.resume_reading()  # the client's pace is no matter of the next request
            if good and self._whole():
                connection.release(self.owner.now_s())
            elif good and self.stream:
                connection.peer.watch_end(connection, self.owner.now_s())
                connection.attempt = BodyDrain(connection, chunked)
            else:
                connection.drop()
        self.owner.on_ended(self, tail)

    def _fail(self, failure: Failure, wait_s: float = 0.0) -> None:
        self.cancel()
        self.owner.on_failed(self, AttemptFailed(failure, True, wait_s or RETRY_AFTER_DEFAULT_S, wait_s=wait_s))


def _passed_headers(headers: dict[bytes, bytes]) -> bytes:
    """The upstream's headers that the client may see. FAULTS.md row 27."""
    return b"".join(b"%b: %b\r\n" % (name, headers[name]) for name in _PASSED if name in headers)


def _ignore(data: bytes) -> None:
    """The attempt is over."""
