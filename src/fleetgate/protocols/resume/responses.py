"""Resuming streams of `/v1/responses` by replay: typed, numbered events that build items.

The text of the deltas is compared, and where items and parts begin and end. The ids and the event numbers of the first
response are kept.
"""

from typing import Any

import msgspec

from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.messages import ResumeMethod
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript

_BEGINS = frozenset({"response.created", "response.queued", "response.in_progress"})
_DELTA = ".delta"
# The parts of an item that are compared. Anything else, a search or an image, has effects and is not run twice.
_TEXTS = ("output_text", "refusal", "function_call_arguments", "reasoning_text", "reasoning_summary_text")
_PARTS = ("output_item", "content_part", "reasoning_part", "reasoning_summary_part")
_DELTAS = frozenset(f"response.{name}{_DELTA}" for name in _TEXTS)
_MARKS = frozenset(
    {f"response.{name}.done" for name in (*_TEXTS, *_PARTS)} | {f"response.{name}.added" for name in _PARTS}
)
_ITEMS = frozenset({"message", "reasoning", "function_call"})
_MARK_CHARS = 64  # a mark counts as so many characters of the bound on kept text

_NONE = msgspec.Raw(b"null")


class _Tool(msgspec.Struct):
    type: str = ""


class _ResumeFields(msgspec.Struct):
    temperature: float | None = None
    tools: list[_Tool] | None = None
    background: bool | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    conversation: msgspec.Raw = _NONE


_decode_fields = msgspec.json.Decoder(_ResumeFields).decode


def response_resume_methods(body: bytes) -> frozenset[ResumeMethod]:
    """How the response to a request of `/v1/responses` may continue elsewhere.

    Only a greedy response can, and only if no engine stores its state and the engine runs no tools.
    """
    try:
        fields = _decode_fields(body)
    except msgspec.MsgspecError:
        return frozenset()
    stored = fields.background or fields.previous_response_id is not None or bytes(fields.conversation) != b"null"
    runs_tools = any(tool.type != "function" for tool in fields.tools or ())
    if fields.temperature != 0 or stored or runs_tools or fields.include or fields.top_logprobs:
        return frozenset()
    return frozenset({ResumeMethod.REPLAY})


class _Item(msgspec.Struct):
    id: str | None = None
    type: str = ""
    call_id: str | None = None
    name: str | None = None


class _Response(msgspec.Struct):
    id: str | None = None
    created_at: float | int | None = None


class _Event(msgspec.Struct):
    type: str
    sequence_number: int | None = None
    output_index: int | None = None
    content_index: int | None = None
    summary_index: int | None = None
    item: _Item | None = None
    delta: str | None = None
    response: _Response | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


def _channel(event: _Event) -> str:
    """The part of the item that an event belongs to."""
    item = event.item
    kind = (item.type, item.name) if item is not None else ()
    return f"{event.type} {event.output_index} {event.content_index} {event.summary_index} {kind}"


class ResponseTranscript(Transcript):
    """What a client has received of a response.

    Shape: in `runs` a mark, for example the start of an item, is a run without text.
    """

    __slots__ = ("created_at", "items", "sequence")

    def __init__(self) -> None:
        super().__init__()
        self.items: dict[int, _Item] = {}
        self.created_at: float | int | None = None
        self.sequence: int | None = None

    def _read(self, data: bytes) -> None:
        try:
            event = _decode_event(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.whole = False
            return
        if event.sequence_number is not None:
            self.sequence = event.sequence_number
        if event.type in _BEGINS:
            if self.id is None and event.response is not None:
                self.id, self.created_at = event.response.id, event.response.created_at
            return
        item = event.item
        # An end is none of them: nothing follows it, so a stream that has one is never resumed.
        if event.type not in _DELTAS | _MARKS or (item is not None and item.type not in _ITEMS):
            self.whole = False
            return
        if item is not None and event.output_index is not None:
            self.items.setdefault(event.output_index, item)
        channel = _channel(event)
        if event.type in _MARKS:
            self._chars += _MARK_CHARS
            self._runs.append((channel, []))
        elif event.delta:
            self.tokens += 1
            self._chars += len(event.delta)
            if self._runs and self._runs[-1][0] == channel:
                self._runs[-1][1].append(event.delta)
            else:
                self._runs.append((channel, [event.delta]))


class ResponseSplicer(StreamSplicer):
    """Joins a response to one that broke off; ids, time and event numbers are those of the first."""

    def __init__(self, transcript: ResponseTranscript, model: str) -> None:
        super().__init__(transcript, ResumeMethod.REPLAY, model)
        self._first = transcript
        self._sequence = transcript.sequence

    def take(self, data: bytes) -> bytes | None:
        """The event for the client, None if the client has it already. Shape: `data` is one event's JSON.

        Raises: `Mismatch`; `Malformed` for data that is no event.
        """
        try:
            typed = _decode_event(data)  # checks the types that the lines below rely on
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Malformed(502, "the upstream sent a malformed event") from None
        if typed.type in _BEGINS:
            return None
        if typed.type in _DELTAS:
            event["delta"] = self._unread(_channel(typed), typed.delta or "")
            if not event["delta"]:
                return None
        elif not self.caught_up:
            if typed.type not in _MARKS or self._at or self._runs[self._run] != (_channel(typed), ""):
                raise Mismatch
            self._run += 1
            return None
        self._set_identity(event)
        return b"event: %b\ndata: %b\n\n" % (typed.type.encode(), msgspec.json.encode(event))

    def _set_identity(self, event: dict[str, Any]) -> None:
        """Write the first response's ids, time, model and event number into an event."""
        if self._sequence is not None:
            self._sequence += 1
            event["sequence_number"] = self._sequence
        known = self._first.items.get(event.get("output_index", -1))
        if known is not None:
            if "item_id" in event and known.id is not None:
                event["item_id"] = known.id
            if event.get("item"):
                _set_item_ids(event["item"], known)
        response = event.get("response")
        if not response:
            return
        for name, value in (("id", self._first.id), ("created_at", self._first.created_at)):
            if value is not None:
                response[name] = value
        if "model" in response:
            response["model"] = self._model
        output = response.get("output")
        for index, item in enumerate(output if isinstance(output, list) else ()):
            if index in self._first.items and isinstance(item, dict):
                _set_item_ids(item, self._first.items[index])


def _set_item_ids(item: dict[str, Any], known: _Item) -> None:
    """Write the ids that the client knows into an item."""
    for name, value in (("id", known.id), ("call_id", known.call_id)):
        if name in item and value is not None:
            item[name] = value
