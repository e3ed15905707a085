"""The relay of an answer that goes on elsewhere: it reads a new answer and passes on what the client has not read."""

from fleetgate.core.exchange import Failure
from fleetgate.protocols import sse
from fleetgate.protocols.clients import openai
from fleetgate.protocols.http1 import Malformed, ResponseHead
from fleetgate.protocols.messages import EventMeaning, Operation
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript
from fleetgate.proxy.transport.response_relay import AttemptListener, ModelNames, ResponseRelay


class ResumeRelay(ResponseRelay):
    """Reads one answer that joins a broken one. Every event is decoded, 3 µs each: such answers are few."""

    def __init__(
        self,
        owner: AttemptListener,
        operation: Operation,
        hide_usage: bool,
        names: ModelNames,
        seam: StreamSplicer,
        script: Transcript,
    ) -> None:
        super().__init__(owner, operation, hide_usage, names)
        self.script = script
        self._seam = seam

    def on_data(self, data: bytes) -> None:
        """Bytes came from the upstream."""
        try:
            super().on_data(data)
        except Mismatch:
            self._fail(Failure.MISMATCH)

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        if not head.event_stream:
            raise Malformed(502, "the upstream answers a stream's continuation with something else")
        super()._begin_body(head, rest)

    def _peek(self, data: bytes) -> None:
        self._sew(data)

    def _stream(self, data: bytes) -> None:
        self._sew(data)

    def _sew(self, data: bytes) -> None:
        out: list[bytes] = []
        self.beats += 1
        try:
            for event in self._events.feed(self._payload(data)):
                self._join(event, out)
        except Malformed:
            if out and self._goes_on():
                self._write_events(out)
            raise
        if out and not self._goes_on():
            return
        if self.done_seen or self._whole():
            self._end_of_stream(out)
        elif out:
            self._write_events(out)

    def _goes_on(self) -> bool:
        """There is something new: tell the owner before the first of it is written. False when it has left."""
        if self._state == self._peek:
            self.owner.on_first(self)
            if self._closed:
                return False
            self._state = self._stream
        return True

    def _join(self, event: bytes, out: list[bytes]) -> None:
        meaning, usage = openai.classify_event(event)
        if usage is not None:
            self.told, self.usage = usage, self._seam.counted(usage)
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
        left = self._seam.take(data)
        if left is not None:
            out.append(left)
            self.event_count += 1
        self.finish_seen = self.finish_seen or meaning is EventMeaning.FINISH
