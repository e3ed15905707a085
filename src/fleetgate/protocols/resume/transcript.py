"""Going on elsewhere with an answer that broke off: what was said so far, and what of a new answer is left to say.

Three ways, as FAULTS.md section 2 names them. R3, *replay*: the request is sent again unchanged, the new answer is
compared with what the client has, and only what follows is passed on. R2, *prefill*: the engine is asked to go on with
what was said. R1, *tokens*: it is given the token ids of prompt and answer (`resume_tokens`). Text is compared, never
bytes: engines cut it differently each time.
"""

from array import array
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from fleetgate.protocols import sse
from fleetgate.protocols.clients.openai import Operation, Usage
from fleetgate.protocols.http1 import Malformed

KEPT_CHARS_MAX = 64 * 1024  # FAULTS.md section 2: longer answers are not compared
KEPT_IDS_MAX = 128 * 1024  # token ids of prompt and answer, 4 bytes each
DIGEST_EVERY = 32  # events; few enough to bound memory, enough to be cheap

_NONE = msgspec.Raw(b"null")


class ResumeMethod(StrEnum):
    """How an answer goes on."""

    REPLAY = "replay"
    PREFILL = "prefill"
    TOKENS = "tokens"


class Mismatch(Exception):
    """The new answer says something else than the client has already read."""


# --- what a request allows --------------------------------------------------------------------------------------------


class _Wants(msgspec.Struct):
    temperature: float | None = None
    top_k: int | None = None
    n: int | None = None
    best_of: int | None = None
    logprobs: msgspec.Raw = _NONE
    top_logprobs: msgspec.Raw = _NONE
    modalities: list[str] | None = None
    tools: msgspec.Raw = _NONE
    functions: msgspec.Raw = _NONE
    response_format: msgspec.Raw = _NONE
    grammar: msgspec.Raw = _NONE
    structured_outputs: msgspec.Raw = _NONE
    guided_json: msgspec.Raw = _NONE
    guided_regex: msgspec.Raw = _NONE
    guided_choice: msgspec.Raw = _NONE
    guided_grammar: msgspec.Raw = _NONE
    echo: bool | None = None
    prompt: msgspec.Raw = _NONE
    return_token_ids: bool | None = None


_decode_wants = msgspec.json.Decoder(_Wants).decode
_NO = (b"null", b"false", b"0", b"[]", b"{}")
_GUIDES = (
    "tools",
    "functions",
    "response_format",
    "grammar",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def resume_methods(body: bytes, operation: Operation) -> frozenset[ResumeMethod]:
    """How the answer to this request may go on elsewhere; empty for one that cannot. Cost: 1 µs at 1 KiB."""
    if operation.name not in ("chat", "completions"):
        return frozenset()
    try:
        wants = _decode_wants(body)
    except msgspec.MsgspecError:
        return frozenset()
    several = (wants.n or 1) > 1 or (wants.best_of or 1) > 1
    spoken = wants.modalities is not None and wants.modalities != ["text"]
    if several or spoken or any(bytes(raw) not in _NO for raw in (wants.logprobs, wants.top_logprobs)):
        return frozenset()
    ways = set()
    if wants.temperature == 0 or wants.top_k == 1:
        ways.add(ResumeMethod.REPLAY)
    guided = any(bytes(getattr(wants, name)) not in _NO for name in _GUIDES)
    listed = operation.name == "completions" and not bytes(wants.prompt).startswith(b'"')
    if wants.return_token_ids:
        # Text that is cut into tokens anew would not go on with the ids that the client has: never by prefill.
        if not guided and not wants.echo:
            ways.add(ResumeMethod.TOKENS)
    elif not guided and not listed and not wants.echo:
        ways.add(ResumeMethod.PREFILL)
    return frozenset(ways)


# --- what was said ----------------------------------------------------------------------------------------------------


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: msgspec.Raw = _NONE
    audio: msgspec.Raw = _NONE


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    logprobs: msgspec.Raw = _NONE
    token_ids: msgspec.Raw = _NONE
    prompt_token_ids: msgspec.Raw = _NONE


class _Event(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    system_fingerprint: str | None = None
    choices: list[_Choice] | None = None
    prompt_token_ids: msgspec.Raw = _NONE


_decode_ids = msgspec.json.Decoder(list[int] | None).decode
_decode_event = msgspec.json.Decoder(_Event).decode


class Transcript:
    """What a client has read of one answer, by channel: content, reasoning, a tool call's name or arguments.

    Shape: `runs` are channel and text, in order; `whole` is False once something came that cannot be compared.
    Shape: with a `token_mark`, which says whose tokens they are, `prompt_ids` and `ids` are kept too; `settled` ids
    have said all that they stand for, -1 where nobody can tell. A mark of 0 says that ids are not known.
    Units: `tokens` are events with text, `quiet_tokens` those without, ahead of some with: engines send one for each
    token, and no text where it is the begin of a character, or while they look for a stop.
    """

    __slots__ = (
        "_chars",
        "_pending",
        "_quiet",
        "_runs",
        "created",
        "fingerprint",
        "holds_back",
        "id",
        "ids",
        "prompt_ids",
        "quiet_tokens",
        "settled",
        "token_mark",
        "tokens",
        "whole",
    )

    def __init__(self, token_mark: int = 0) -> None:
        self.token_mark = token_mark
        self.prompt_ids: array[int] | None = None
        self.ids = array("i")
        self.settled = -1
        self._pending: list[bytes] = []
        self._runs: list[tuple[str, list[str]]] = []
        self._chars = 0
        self.id: str | None = None
        self.created: int | None = None
        self.fingerprint: str | None = None
        self.tokens = self.quiet_tokens = self._quiet = 0
        self.holds_back = False  # its engine looks for a stop, so that what came may end anywhere in a word
        self.whole = True

    def keep(self, event: bytes) -> None:
        """An event went to the client, bare or as one chunk. Cost: 0.1 µs, and 0.8 µs when they are read."""
        self._pending.append(event)
        if len(self._pending) >= DIGEST_EVERY:
            self.digest()

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Everything said so far."""
        self.digest()
        return [(channel, "".join(parts)) for channel, parts in self._runs]

    def digest(self) -> None:
        """Read the events that were only kept so far."""
        pending, self._pending = self._pending, []
        if not self.whole:
            return
        for event in pending:
            # A chunk's line end behind the blank line tells it from an event whose lines end in CR LF.
            framed = event.endswith(b"\n\n\r\n")
            bare = event[event.find(b"\r\n") + 2 : -2] if framed else event
            data = sse.data_of(bare)
            if data is not None and data.strip() != b"[DONE]":
                self._read(data)
        if self._chars > KEPT_CHARS_MAX:
            self.whole = False
        if not self.whole:
            self._runs = []

    def prefix(self) -> tuple[str, str, int]:
        """What an engine can go on from, what it then has to say again, and the tokens of the first.

        Templates strip a message, and the begin of a word is not cut into tokens as the word is: neither ends a prefix.
        """
        runs = self.runs
        channel, text = runs[-1]
        head = text
        if self.holds_back:
            head = text[: max(text.rfind(" "), text.rfind("\n"), 0)]
        if channel != "text":
            head = head.rstrip()
        again, tokens = len(text) - len(head), self.tokens + (0 if self.holds_back else self.quiet_tokens)
        for part in reversed(self._runs[-1][1]):
            if again <= 0:
                break
            again -= len(part)
            tokens -= 1
        return head, text[len(head) :], tokens

    def _read(self, data: bytes) -> None:
        try:
            event = _decode_event(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.whole = False
            return
        if self.id is None:
            self.id, self.created, self.fingerprint = event.id, event.created, event.system_fingerprint
        before = self._chars
        for choice in event.choices or ():
            if choice.index or not _is_comparable(choice):
                self.whole = False
                return
            for channel, text in _pieces(choice):
                self._chars += len(text)
                if self._runs and self._runs[-1][0] == channel:
                    self._runs[-1][1].append(text)
                else:
                    self._runs.append((channel, [text]))
        if self._chars > before:
            self.tokens, self.quiet_tokens, self._quiet = self.tokens + 1, self.quiet_tokens + self._quiet, 0
        elif any(map(_is_quiet, event.choices or ())):
            self._quiet += 1
        if self.token_mark:
            try:
                self._count(event, self._chars > before)
            except (msgspec.MsgspecError, OverflowError):
                self.token_mark = 0

    def _count(self, event: _Event, said: bool) -> None:
        """Keep an event's token ids. Raises: `MsgspecError` and `OverflowError` for what are none."""
        choices = event.choices or ()
        if self.prompt_ids is None:
            for raw in (event.prompt_token_ids, *(choice.prompt_token_ids for choice in choices)):
                ids = _decode_ids(raw)
                if ids:
                    self.prompt_ids = array("i", ids)
        new = [one for choice in choices for one in _decode_ids(choice.token_ids) or ()]
        self.ids.extend(new)
        if said:
            # Of several tokens the last may be the begin of a character, whose text is still to come; of one it is not.
            self.settled = len(self.ids) if len(new) == 1 else -1
        if (said and not new) or len(self.ids) + len(self.prompt_ids or ()) > KEPT_IDS_MAX:
            self.token_mark = 0


def _is_comparable(choice: _Choice) -> bool:
    delta = choice.delta
    spoken = delta is not None and (bytes(delta.function_call) != b"null" or bytes(delta.audio) != b"null")
    return not spoken and bytes(choice.logprobs) == b"null"


def _is_quiet(choice: _Choice) -> bool:
    delta = choice.delta
    return choice.text == "" or (delta is not None and delta.content == "" and delta.role is None)


def _pieces(choice: _Choice) -> Iterator[tuple[str, str]]:
    """What one event adds, by channel, in the order in which `StreamSplicer` looks at it."""
    if choice.text:
        yield "text", choice.text
    delta = choice.delta
    if delta is None:
        return
    for name in _TEXTS:
        text = getattr(delta, name)
        if text:
            yield name, text
    for call in delta.tool_calls or ():
        function = call.function or _Function()
        if function.name:
            yield f"{call.index}.name", function.name
        if function.arguments:
            yield f"{call.index}.arguments", function.arguments


_TEXTS = ("reasoning_content", "reasoning", "content", "refusal")


# --- what is left to say ----------------------------------------------------------------------------------------------


class StreamSplicer:
    """Joins a new answer to a broken one: takes its events and gives those that the client has not read.

    All of them carry the id, the time and the model name of the first answer: to its client it is one.
    """

    def __init__(self, transcript: Transcript, way: ResumeMethod, model: str) -> None:
        self._runs = transcript.runs if way is ResumeMethod.REPLAY else []
        self._said = {channel for channel, _ in self._runs}
        self._prefilled_tokens = 0
        if way is ResumeMethod.PREFILL:
            _, again, self._prefilled_tokens = transcript.prefix()
            self._runs = [(transcript.runs[-1][0], again)] if again else []
        self._transcript = transcript
        self._counts_ids = way is not ResumeMethod.PREFILL and transcript.token_mark != 0
        self._owed = list(transcript.ids) if way is ResumeMethod.REPLAY and self._counts_ids else []
        self._model = model
        self._run = self._at = 0

    @property
    def caught_up(self) -> bool:
        """Whether the new answer has come to where the old one broke off."""
        return self._run >= len(self._runs)

    def take(self, data: bytes) -> bytes | None:
        """An event for the client, or None where it has read it already. Shape: `data` is one event's JSON.

        Raises: `Mismatch`, and `Malformed` for what is no event.
        """
        try:
            _decode_event(data)  # only for its types, which the lines below rely on
            event = msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise Malformed(502, "the upstream sent a malformed event") from None
        self._shape(event)
        news = bool(event.get("usage")) and not event.get("choices")  # engines may tell usage in every event
        for choice in event.get("choices") or ():
            news = self._trim(choice) or news
        if not news:
            return None
        self._sign(event)
        return b"data: %b\n\n" % msgspec.json.encode(event)

    def counted(self, usage: Usage) -> Usage:
        """The usage of the whole answer: an engine that went on counts what was said as prompt."""
        tokens = self._prefilled_tokens
        if not tokens:
            return usage
        return Usage(prompt_tokens=max(0, usage.prompt - tokens), completion_tokens=usage.output + tokens)

    def _shape(self, event: dict[str, Any]) -> None:
        """Make it an event of the operation that was asked for; here it is one."""

    def _trim(self, choice: dict[str, Any]) -> bool:
        """Leave of a choice what is new; False where nothing is."""
        if choice.get("index"):
            raise Mismatch  # another choice than the one that broke off
        news = self._counts_ids and self._trim_ids(choice)
        if choice.get("text"):
            choice["text"] = self._unread("text", choice["text"])
            news = news or bool(choice["text"])
        delta = choice.get("delta") or {}
        delta.pop("role", None)
        for name in _TEXTS:
            if delta.get(name):
                delta[name] = self._unread(name, delta[name])
                news = news or bool(delta[name])
            if not delta.get(name):
                delta.pop(name, None)
        calls = [call for call in delta.get("tool_calls") or () if self._trim_call(call)]
        if calls:
            delta["tool_calls"] = calls
        else:
            delta.pop("tool_calls", None)
        if choice.get("finish_reason"):
            if not self.caught_up or self._owed:
                raise Mismatch
            return True
        return news or bool(calls)

    def _trim_ids(self, choice: dict[str, Any]) -> bool:
        """Leave of its token ids those that the client has not got."""
        choice.pop("prompt_token_ids", None)
        ids = choice.get("token_ids") or []
        if type(ids) is not list:
            raise Malformed(502, "the upstream's token ids are no list")
        again = min(len(ids), len(self._owed))
        if ids[:again] != self._owed[:again]:
            raise Mismatch
        del self._owed[:again]
        if again:
            choice["token_ids"] = ids[again:]
        return len(ids) > again

    def _trim_call(self, call: dict[str, Any]) -> bool:
        index, function = call.get("index", 0), call.get("function") or {}
        known = f"{index}.name" in self._said
        if function.get("name"):
            name = self._unread(f"{index}.name", function["name"])
            if known:
                del function["name"]
                call.pop("id", None)  # each answer makes up its own
                call.pop("type", None)
            elif not name:
                raise Mismatch
        if function.get("arguments"):
            function["arguments"] = self._unread(f"{index}.arguments", function["arguments"])
        return not known or bool(function.get("arguments"))

    def _unread(self, channel: str, text: str) -> str:
        """The part of a text that goes on from what was said."""
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

    def _sign(self, event: dict[str, Any]) -> None:
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


# --- asking an engine to go on ----------------------------------------------------------------------------------------

_LENGTHS = ("max_completion_tokens", "max_tokens")


def prefill_body(body: bytes, transcript: Transcript, engine: str) -> bytes | None:
    """The request that lets an engine go on with what was said; None where that cannot be said as a prefix.

    Source: vLLM's and SGLang's `continue_final_message`; llama.cpp takes a last message of the assistant as a prefix.
    """
    runs = transcript.runs
    if not transcript.whole or len(runs) != 1 or runs[0][0] not in ("content", "text"):
        return None
    try:
        asked = msgspec.json.decode(body)
    except msgspec.MsgspecError:  # a number that is none, say
        return None
    transcript.holds_back = bool(asked.get("stop"))
    text, _, tokens = transcript.prefix()
    if not text:
        return None
    for name in _LENGTHS:
        if asked.get(name) is not None:
            if type(asked[name]) is not int or asked[name] <= tokens:
                return None
            asked[name] -= tokens
    if runs[0][0] == "text":
        if not isinstance(asked.get("prompt"), str):
            return None
        asked["prompt"] += text
        return msgspec.json.encode(asked)
    if not isinstance(asked.get("messages"), list):
        return None
    asked["messages"] = [*asked["messages"], {"role": "assistant", "content": text}]
    return msgspec.json.encode({**asked, **prefix_fields(engine)})


def prefix_fields(engine: str) -> dict[str, bool]:
    """What tells an engine that the last message, the assistant's, is to be gone on with."""
    return {} if engine == "llamacpp" else {"continue_final_message": True, "add_generation_prompt": False}
