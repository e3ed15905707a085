"""Relays the response of one attempt: holds back all before the first content, passes on the rest, checks the end.

The fast path of a stream makes no object for an event: a read that is exactly one chunk with one plain content event is
passed on as the same bytes object, once it is known to be JSON (0.3 µs).
"""

from enum import Enum
from time import time

import msgspec

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.protocols import http1
from fleetgate.protocols.http1 import ChunkedBody, Malformed, ResponseHead, ResponseMemo
from fleetgate.protocols.json_checks import is_json, is_text
from fleetgate.protocols.messages import EventMeaning, Usage
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.protocols.sse import Events, EventTooLong, as_text, data_of, is_plain
from fleetgate.protocols.upstream_errors import failure_of, retry_after_s
from fleetgate.proxy.transport.connection_pool import UpstreamConnection
from fleetgate.proxy.transport.interface import ExpectedResponse, ResponseListener

BODY_KEPT_BYTES_MAX = 8 * 1024 * 1024  # a body up to this size is held back until it is known to be whole
HELD_EVENTS_BYTES_MAX = 256 * 1024  # role events and comments before the first content; more is a fault
RETRY_AFTER_DEFAULT_S = 1.0

# Events that may come before the first content; they are held back while the request can still move.
_BEFORE_CONTENT = frozenset({EventMeaning.OTHER, EventMeaning.USAGE, EventMeaning.COMMENT})


class ReadState(Enum):
    """What the next bytes of a response are."""

    HEAD = 0
    PEEK = 1  # events before the first content
    STREAM = 2  # events after it
    HOLD = 3  # a body that is held back until it is whole
    PASS = 4  # a body that is too large to be held back
    OVER = 5


# A member read off its enum costs 70 ns each time.
HEAD, PEEK, STREAM, HOLD, PASS, OVER = ReadState


class ResponseRelay:
    """Reads one response. `on_data` and `on_lost` are called by the connection that carries the request."""

    # Class attributes are the defaults: most responses never change most of them, and setting each costs time.
    connection: UpstreamConnection | None = None
    is_connected = False
    head: ResponseHead | None = None
    status = 0
    stream = False
    paused = False  # the client reads slower than the upstream writes
    over = False
    raw = False  # an HTTP/1.0 client: no chunked framing
    event_count = 0
    body_bytes = 0
    beats = 0  # reads that were not one plain event: comments and other signs of life
    dropped = 0
    finish_seen = False
    done_seen = False
    usage: Usage | None = None
    own_usage: Usage | None = None  # of a resumed stream: the usage that its own engine reported
    inherited = 0  # events that another engine generated, and that this one got as its prompt
    transcript: Transcript | None = None  # of a stream that may be resumed
    choices: dict[int, bool] | None = None  # of a stream with several choices: those that began, and whether each ended
    passed = b""  # header lines of the upstream that the client may see. faults.md row 27
    _state = HEAD
    _buffer = b""
    _chunked: ChunkedBody | None = None
    _left = -1
    held: list[bytes]
    _body: list[bytes]
    _events: Events

    def __init__(self, listener: ResponseListener, expected: ExpectedResponse) -> None:
        self.listener = listener
        self._protocol = expected.protocol
        self.operation = expected.operation
        self.hide_usage = expected.hide_usage
        self.wants_whole = expected.wants_whole
        self._names = names = expected.names
        self._rename = names.rename
        if expected.raw:
            self.raw = True
        if expected.several_choices:
            self.choices = {}
            self.operation = msgspec.structs.replace(self.operation, fast_mark=b"\x00")  # no event is plain

    # --- reports of the connection ---

    def on_data(self, data: bytes) -> None:
        """Bytes came from the upstream."""
        state = self._state
        try:
            if state is STREAM:
                if self._is_one_plain_event(data):
                    self.event_count += 1
                    self.listener.write(data)
                    if self.transcript is not None:
                        self.transcript.keep(data)
                else:
                    self._read_events(data)
            elif state is HEAD:
                self._read_head(data)
            elif state is PEEK:
                self._peek(data)
            elif state is HOLD:
                self._hold(data)
            elif state is PASS:
                self._pass_on(data)
        except (Malformed, EventTooLong):
            self._fail(Failure.BAD_OUTPUT)
        except Exception as error:
            self._end_by_bug(error)

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended by itself."""
        try:
            self._lose(error)
        except Exception as bug:
            self._end_by_bug(bug)

    def _lose(self, error: Exception | None) -> None:
        connection, self.connection = self.connection, None
        self.is_connected = False
        if self.over:
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
            self.listener.on_stale(self)
        else:
            self._fail(Failure.BROKEN)

    # --- calls of the listener ---

    def finish(self) -> bool:
        """End a stream of which only usage and `[DONE]` may be missing; False if more is missing."""
        if not self.finish_seen or not self.stream or self.choices is not None:
            return False
        self._events.partial = b""
        self._end_of_stream([])
        return True

    def cancel(self) -> None:
        """Close the connection at once, which frees the engine's slot."""
        self.over = True
        self._state = OVER
        self.is_connected = False
        if self.connection is not None:
            self.connection.drop()
            self.connection = None

    def pause(self) -> None:
        """Stop reading from the connection, or from the one that is being made."""
        if not self.over:
            self.paused = True
            if self.connection is not None:
                self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Read from the connection again."""
        self.paused = False
        if self.connection is not None:
            self.connection.transport.resume_reading()

    # --- head ---

    def _read_head(self, data: bytes) -> None:
        memo = self.connection.pool.memo if self.connection is not None else ResponseMemo()
        known = memo.recall(data) if not self._buffer else None
        if known is not None:
            head, end, self._left = known
            self.passed = (
                memo.passed if memo.passed_by is self._protocol else self._protocol.response_headers(head.headers)
            )
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
        """Parse one head; return what follows an interim one, else nothing."""
        head = http1.parse_response_head(head_bytes)
        self._left = head.content_length
        if head.status < 200:  # 100 Continue and other interim heads are not passed on
            return rest
        failure = failure_of(head.status, head.headers)
        if failure is not None:
            self.head, self.status = head, head.status
            self._fail(failure, retry_after_s(head.headers, time()))
            return b""
        memo.keep(head_bytes, head)
        self.passed = memo.passed = self._protocol.response_headers(head.headers)
        memo.passed_by = self._protocol
        self._begin_body(head, rest)
        return b""

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        self.head = head
        self.status = head.status
        if head.chunked:
            self._chunked = ChunkedBody()
        if head.event_stream:
            if self.wants_whole:  # the client could neither read it nor tell whether it is complete
                raise Malformed(502, "an event stream where none was requested")
            self.stream = True
            self.held = []
            self._events = Events()
            self._state = PEEK
            if rest or self._left == 0:
                self._peek(rest)
            return
        if head.status in (204, 304):
            self._left = 0
        if self._left == len(rest):  # most bodies come in one read with their head
            self._left = 0
            self._whole_body(rest)
            return
        self._body = []
        self._state = HOLD
        if rest:
            self._hold(rest)

    # --- framing ---

    def _payload(self, data: bytes) -> bytes:
        """Remove the framing. Afterwards `_is_whole` tells whether the body has ended."""
        if self._chunked is not None:
            return self._chunked.feed(data)
        if self._left >= 0:
            if len(data) > self._left:
                self._buffer = data[self._left :]  # bytes after the body: the connection is not used again
                data = data[: self._left]
            self._left -= len(data)
        return data

    def _is_whole(self) -> bool:
        return self._chunked.done if self._chunked is not None else self._left == 0

    # --- a response that is not a stream ---

    def _hold(self, data: bytes) -> None:
        payload = self._payload(data)
        self._body.append(payload)
        self.body_bytes += len(payload)
        if self.body_bytes > BODY_KEPT_BYTES_MAX:
            if (self._chunked is None and self._left < 0) or not self.wants_whole:
                raise Malformed(502, "too large to check whether it is whole, or no stream where one was requested")
            self.held, self._body = self._body, []
            self.listener.on_first(self)
            if self.over:
                return
            self._state = PASS
            self._write_held()
        if self._is_whole():
            self._end_of_body()

    def _pass_on(self, data: bytes) -> None:
        payload = self._payload(data)
        self.body_bytes += len(payload)
        if payload:
            self.listener.write(payload if self.raw else http1.chunk(payload))
        if self._is_whole():
            self._end_of_body()

    def _end_of_body(self) -> None:
        if self._state is HOLD:
            self._whole_body(b"".join(self._body))
        elif self._state is PASS:
            self._finish(b"" if self.raw else http1.LAST_CHUNK)
        else:
            self._end_of_stream([])

    def _whole_body(self, body: bytes) -> None:
        if self.status < 300:
            if not body.isascii() and not is_text(body):
                raise Malformed(502, "the upstream's body is not UTF-8")
            self.usage, is_error = self._protocol.read_answer(body)
            if is_error:
                self._fail_by_error(body)
                return
            if not self.wants_whole and self.operation.streams:  # SDKs would read an empty stream
                raise Malformed(502, "no stream where one was requested")
            self._learn_name(body)
        if self._rename is not None:
            body = self._protocol.rename_model(body, *self._rename)
        self.held = [body]
        self.finish_seen = True
        self.listener.on_first(self)  # keeps head and body for the end, which is now
        if not self.over:
            self._finish(b"")

    def _fail_by_error(self, body: bytes) -> None:
        """An error object behind status 200 counts as the status that it names. faults.md rows 22 and 24."""
        status = self._protocol.status_of_error(body)
        failure = failure_of(status, {})
        if failure is not None:
            self._fail(failure)
            return
        self.status, self.stream, self.held = status, False, [body]
        self.passed = b"content-type: %b\r\n" % self._protocol.ERROR_TYPE
        self.finish_seen = True
        self.listener.on_first(self)
        if not self.over:
            self._finish(b"")

    # --- a stream before its first content ---

    def _peek(self, data: bytes) -> None:
        events = self._events.feed(self._payload(data))
        meaning: EventMeaning | None = None
        for position, event in enumerate(map(as_text, events)):
            meaning, usage = self._protocol.classify_event(event)
            self.usage = usage or self.usage
            if meaning is EventMeaning.ERROR:
                self._fail_by_error(data_of(event) or b"")
                return
            if meaning is EventMeaning.DONE:
                break  # an empty stream: the request may still move
            if meaning is EventMeaning.MALFORMED:
                self.dropped += 1
                continue
            if meaning is EventMeaning.USAGE and self.hide_usage:
                continue
            self._learn_name(event)
            if self.choices is not None:
                self._protocol.note_choices(event, self.choices)
            if meaning in _BEFORE_CONTENT:
                self.held.append(self._named(event))
                continue
            self.listener.on_first(self)
            if self.over:
                return
            self._state = STREAM
            out, self.held = self.held, []
            self._take(events[position:], out)
            return
        if sum(map(len, self.held)) > HELD_EVENTS_BYTES_MAX:
            raise Malformed(502, "no content event among the first ones")
        if self._is_whole() or meaning is EventMeaning.DONE:
            self._fail(Failure.BAD_OUTPUT)  # an empty stream

    # --- a stream after it ---

    def _read_events(self, data: bytes) -> None:
        self.beats += 1
        self._take(self._events.feed(self._payload(data)), [])

    def _take(self, events: list[bytes], out: list[bytes]) -> None:
        try:
            self._sort(events, out)
        except Malformed:
            if out:  # events that came whole before the fault go to the client
                self._write_events(out)
            raise
        if self.done_seen or self._is_whole():
            self._end_of_stream(out)
        elif out:
            self._write_events(out)

    def _write_events(self, events: list[bytes]) -> None:
        if self.transcript is not None:
            for event in events:
                self.transcript.keep(event)
        payload = b"".join(events)
        self.listener.write(payload if self.raw else http1.chunk(payload))

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
            and data.find(b"\r", line + 2) == len(data) - 2  # a CR is a line end too and could end the event
            and data.endswith(b"}\n\n\r\n")
            and data.startswith(self._protocol.EVENT_BEGINS, line + 2)
            and (data.isascii() or is_text(data))
            and data.find(self.operation.fast_mark, line) > 0
            and data[:line] == b"%x" % length
            and is_json(data[brace:-4])
        )

    def _sort(self, events: list[bytes], out: list[bytes]) -> None:
        """Add the events for the client to `out`."""
        mark = self.operation.fast_mark
        for event in map(as_text, events):
            if event.find(mark) >= 0 and event.startswith(b"data: {") and is_plain(event):
                self.event_count += 1
                out.append(self._named(event))
                continue
            meaning, usage = self._protocol.classify_event(event)
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
                return  # events after [DONE] are not passed on
            if meaning in (EventMeaning.FINISH, EventMeaning.CONTENT):
                self.finish_seen = self.finish_seen or meaning is EventMeaning.FINISH
                self.event_count += 1
            elif meaning is EventMeaning.USAGE and self.hide_usage:
                continue
            if self.choices is not None:
                self._protocol.note_choices(event, self.choices)
                self.finish_seen = self.finish_seen and all(self.choices.values())
            out.append(self._named(event))

    def _end_of_stream(self, last: list[bytes]) -> None:
        if self._state is PEEK or not self.finish_seen or (self._events.partial and not self.done_seen):
            if last:
                self._write_events(last)
            self._fail(Failure.BAD_OUTPUT)
            return
        if not self.done_seen and self.operation.done_mark:
            last.append(self.operation.done_mark)
        tail = b"".join(last)
        if not self.raw:
            tail = (http1.chunk(tail) if tail else b"") + http1.LAST_CHUNK
        self._finish(tail)

    # --- names ---

    def _learn_name(self, data: bytes) -> None:
        """Clients get the model name that they asked for, also if the engine uses a third name."""
        names = self._names
        if data.find(names.mark) < 0:  # `in` on bytes costs twice as much
            other = self._protocol.other_model_name(data, names.asked)
            if other is not None:
                self._rename = (other, names.asked)

    def _named(self, event: bytes) -> bytes:
        return event if self._rename is None else self._protocol.rename_model(event, *self._rename)

    def _write_held(self) -> None:
        payload, self.held = self._named(b"".join(self.held)), []
        self.listener.write(payload if self.raw else http1.chunk(payload))

    # --- ends ---

    def _finish(self, tail: bytes) -> None:
        self.over = True
        self._state = OVER
        connection, self.connection = self.connection, None
        if connection is not None:
            self.is_connected = False
            head, chunked = self.head, self._chunked
            surplus = self._buffer or (chunked is not None and chunked.rest)
            is_clean = head is not None and head.keep_alive and not surplus
            if self.paused:
                connection.transport.resume_reading()  # this client's pace does not concern the next request
            if is_clean and self._is_whole():
                connection.release(self.listener.now_s())
            elif is_clean and self.stream:
                connection.pool.drain(connection, chunked, self.listener.now_s())
            else:
                connection.drop()
        self.listener.on_ended(self, tail)

    def _end_by_bug(self, error: Exception) -> None:
        """End this request alone. No Endpoint is blamed: another one would meet the same bug. faults.md row 75."""
        self.cancel()
        self.listener.on_internal_error(error)

    def _fail(self, failure: Failure, wait_s: float = 0.0) -> None:
        self.cancel()
        self.listener.on_failed(self, AttemptFailed(failure, True, wait_s or RETRY_AFTER_DEFAULT_S, wait_s=wait_s))
