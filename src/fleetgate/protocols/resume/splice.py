"""Joining a new stream to one that broke off: the client receives what it does not have yet."""

from typing import Any

import msgspec

from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.messages import ResumeMethod, Usage
from fleetgate.protocols.resume.transcript import TEXT_FIELDS, Transcript, decode_event


class Mismatch(Exception):
    """The new stream differs from the text that the client has."""


class StreamSplicer:
    """Takes the events of a new stream and returns those that the client does not have yet.

    All of them carry the id, the time and the model name of the first stream: the client sees one response.
    """

    def __init__(self, transcript: Transcript, method: ResumeMethod, model: str) -> None:
        self._runs = transcript.runs if method is ResumeMethod.REPLAY else []
        self._seen_channels = {channel for channel, _ in self._runs}
        self._prefilled_tokens = 0
        if method is ResumeMethod.PREFILL:
            _, repeated, self._prefilled_tokens = transcript.prefix()
            self._runs = [(transcript.runs[-1][0], repeated)] if repeated else []
        self._transcript = transcript
        self._compares_ids = method is not ResumeMethod.PREFILL and transcript.token_mark != 0
        self._expected_ids = list(transcript.ids) if method is ResumeMethod.REPLAY and self._compares_ids else []
        self._model = model
        self._run = self._at = 0  # the position in `_runs`: which run, and where in its text

    @property
    def caught_up(self) -> bool:
        """Whether the new stream has reached the point where the old one broke off."""
        return self._run >= len(self._runs)

    def take(self, data: bytes) -> bytes | None:
        """The event for the client, None if the client has it already. Shape: `data` is one event's JSON.

        Raises: `Mismatch`; `Malformed` for data that is no event.
        """
        try:
            decode_event(data)  # checks the types that the lines below rely on
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Malformed(502, "the upstream sent a malformed event") from None
        self._shape(event)
        is_new = bool(event.get("usage")) and not event.get("choices")  # engines may report usage in every event
        for choice in event.get("choices") or ():
            is_new = self._trim(choice) or is_new
        if not is_new:
            return None
        self._set_identity(event)
        return b"data: %b\n\n" % msgspec.json.encode(event)

    def counted(self, usage: Usage) -> Usage:
        """The usage of the whole response. An engine that continued it counts the text that it was given as prompt."""
        tokens = self._prefilled_tokens
        if not tokens:
            return usage
        return Usage(prompt_tokens=max(0, usage.prompt - tokens), completion_tokens=usage.output + tokens)

    def _shape(self, event: dict[str, Any]) -> None:
        """Make it an event of the operation that the client asked for. Here it is one already."""

    def _trim(self, choice: dict[str, Any]) -> bool:
        """Leave of a choice what is new; False if nothing is."""
        if choice.get("index"):
            raise Mismatch  # another choice than the one that broke off
        is_new = self._compares_ids and self._trim_ids(choice)
        if choice.get("text"):
            choice["text"] = self._unread("text", choice["text"])
            is_new = is_new or bool(choice["text"])
        delta = choice.get("delta") or {}
        delta.pop("role", None)
        for name in TEXT_FIELDS:
            if delta.get(name):
                delta[name] = self._unread(name, delta[name])
                is_new = is_new or bool(delta[name])
            if not delta.get(name):
                delta.pop(name, None)
        calls = [call for call in delta.get("tool_calls") or () if self._trim_call(call)]
        if calls:
            delta["tool_calls"] = calls
        else:
            delta.pop("tool_calls", None)
        if choice.get("finish_reason"):
            if not self.caught_up or self._expected_ids:
                raise Mismatch
            return True
        return is_new or bool(calls)

    def _trim_ids(self, choice: dict[str, Any]) -> bool:
        """Leave of a choice's token ids those that the client does not have; False if there are none."""
        choice.pop("prompt_token_ids", None)
        ids = choice.get("token_ids") or []
        if type(ids) is not list:
            raise Malformed(502, "the upstream sent `token_ids` that are not a list")
        repeated = min(len(ids), len(self._expected_ids))
        if ids[:repeated] != self._expected_ids[:repeated]:
            raise Mismatch
        del self._expected_ids[:repeated]
        if repeated:
            choice["token_ids"] = ids[repeated:]
        return len(ids) > repeated

    def _trim_call(self, call: dict[str, Any]) -> bool:
        """Leave of a tool call what is new; False if nothing is."""
        index, function = call.get("index", 0), call.get("function") or {}
        known = f"{index}.name" in self._seen_channels
        if function.get("name"):
            name = self._unread(f"{index}.name", function["name"])
            if known:
                del function["name"]
                call.pop("id", None)  # each engine makes its own; the client has the first one
                call.pop("type", None)
            elif not name:
                raise Mismatch
        if function.get("arguments"):
            function["arguments"] = self._unread(f"{index}.arguments", function["arguments"])
        return not known or bool(function.get("arguments"))

    def _unread(self, channel: str, text: str) -> str:
        """The part of a text that follows what the client has."""
        while text and not self.caught_up:
            expected_channel, expected = self._runs[self._run]
            length = min(len(text), len(expected) - self._at)
            if channel != expected_channel or expected[self._at : self._at + length] != text[:length]:
                raise Mismatch
            self._at += length
            text = text[length:]
            if self._at == len(expected):
                self._run, self._at = self._run + 1, 0
        return text

    def _set_identity(self, event: dict[str, Any]) -> None:
        """Write the first stream's id, time, model and usage into an event."""
        first = self._transcript
        for name, value in (("id", first.id), ("created", first.created), ("system_fingerprint", first.fingerprint)):
            if value is not None:
                event[name] = value
        if "model" in event:
            event["model"] = self._model
        usage = event.get("usage")
        if usage and self._prefilled_tokens:
            usage["prompt_tokens"] = max(0, (usage.get("prompt_tokens") or 0) - self._prefilled_tokens)
            usage["completion_tokens"] = (usage.get("completion_tokens") or 0) + self._prefilled_tokens
