"""Reads the response that continues an interrupted stream, and passes on only the part that the client lacks."""

from fleetgate.core.exchange import Failure
from fleetgate.protocols import sse
from fleetgate.protocols.http1 import Malformed, ResponseHead
from fleetgate.protocols.messages import EventMeaning
from fleetgate.protocols.resume.splice import Mismatch
from fleetgate.proxy.transport.interface import ExpectedResponse, ResponseListener
from fleetgate.proxy.transport.response_relay import PEEK, STREAM, ResponseRelay


class ResumeRelay(ResponseRelay):
    """Reads one continuation. Every event is decoded, which costs 3 µs: such responses are few."""

    def __init__(self, listener: ResponseListener, expected: ExpectedResponse) -> None:
        super().__init__(listener, expected)
        resumed = expected.resumed
        assert resumed is not None, "the transport chose this class by it"
        self.transcript = resumed.transcript
        self.event_count = resumed.event_count
        self.inherited = resumed.inherited
        self._splicer = resumed.splicer

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        if not head.event_stream:
            raise Malformed(502, "the continuation of a stream is not a stream")
        super()._begin_body(head, rest)

    def _is_one_plain_event(self, data: bytes) -> bool:
        return False

    def _peek(self, data: bytes) -> None:
        self._read_events(data)

    def _read_events(self, data: bytes) -> None:
        out: list[bytes] = []
        self.beats += 1
        try:
            for event in self._events.feed(self._payload(data)):
                self._splice(event, out)
        except Mismatch:
            self._fail(Failure.MISMATCH)
            return
        except Malformed:
            if out and self._begin_passing():
                self._write_events(out)
            raise
        if out and not self._begin_passing():
            return
        if self.done_seen or self._is_whole():
            self._end_of_stream(out)
        elif out:
            self._write_events(out)

    def _begin_passing(self) -> bool:
        """Report the first new event before it is written. False if the listener cancelled the response then."""
        if self._state is PEEK:
            self.listener.on_first(self)
            if self.over:
                return False
            self._state = STREAM
        return True

    def _splice(self, event: bytes, out: list[bytes]) -> None:
        meaning, usage = self._protocol.classify_event(event)
        if usage is not None:
            self.own_usage, self.usage = usage, self._splicer.counted(usage)
        match meaning:
            case EventMeaning.COMMENT:
                return
            case EventMeaning.MALFORMED:
                self.dropped += 1
                return
            case EventMeaning.ERROR:
                raise Malformed(502, "the upstream reported an error in its stream")
            case EventMeaning.DONE:
                if not self.finish_seen:
                    raise Malformed(502, "[DONE] without any finish_reason")
                self.done_seen = True
                out.append(event)
                return
            case EventMeaning.USAGE if self.hide_usage:
                return
        data = sse.data_of(event)
        assert data is not None, "an event that means something has data"
        rest = self._splicer.take(data)
        if rest is not None:
            out.append(rest)
            self.event_count += 1
        self.finish_seen = self.finish_seen or meaning is EventMeaning.FINISH
