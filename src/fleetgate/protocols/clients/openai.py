"""The OpenAI protocol without I/O: what a request asks, how an error looks, what an event means."""

import re
from enum import Enum
from typing import Any

import msgspec

from fleetgate.protocols import json_checks as bounds
from fleetgate.protocols import json_members as members
from fleetgate.protocols import sse
from fleetgate.protocols.http1 import Malformed

InvalidBody = members.InvalidBody
top_level = members.top_level

# --- what a request asks ----------------------------------------------------------------------------------------------


class Operation(msgspec.Struct, frozen=True):
    """One path of the protocol.

    Shape: `path` follows the base URL; `fast_mark` is in every content event of compact JSON and in no other, so that
    one `find` tells it apart; `done_mark` says whether a stream ends with `[DONE]`.
    """

    name: str
    path: bytes
    fast_mark: bytes
    done_mark: bool = True
    usage_option: bool = True


OPERATIONS = {
    b"/v1/chat/completions": Operation("chat", b"/chat/completions", b'"finish_reason":null'),
    b"/v1/completions": Operation("completions", b"/completions", b'"finish_reason":null'),
    b"/v1/embeddings": Operation("embeddings", b"/embeddings", b"\x00", usage_option=False),
    b"/v1/responses": Operation(
        "responses", b"/responses", b'"type":"response.output_text.delta"', done_mark=False, usage_option=False
    ),
}
MODELS_PATH = b"/v1/models"

# Engines that know `stream_options.include_usage`; others count as opaque and are not asked. DESIGN.md section 3.
USAGE_ENGINES = frozenset({"vllm", "sglang", "llamacpp", "tensorrt-llm"})


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Fields(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    n: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")


class RequestInfo(msgspec.Struct, frozen=True):
    """What routing needs of a body. Shape: `plain` says that the one `"model"` in the body is the top-level key;
    `several` says that its answer may have more than one choice."""

    model: str
    stream: bool
    wants_usage: bool
    has_stream_options: bool
    plain: bool
    several: bool = False


_MODEL = b'"model"'
_ESCAPED = b"\\u006"  # how every escape of a letter of `model` begins
_decode_fields = msgspec.json.Decoder(_Fields).decode
_FLAG = frozenset({bool, type(None)})
_ONE = (None, 1)
_decode_whole = msgspec.json.Decoder(dict[str, Any]).decode
_FIELD_PATH = re.compile(r"at `\$\.?([\w.]*)`|field `(\w+)`")


_TOO_DEEP = (
    f"the request body nests deeper than {bounds.DEPTH_MAX} levels, "
    f"or has more than {bounds.CONTAINERS_MAX} objects and arrays; flatten or split it"
)
_TOO_MUCH = f"the request body has more than {bounds.VALUES_MAX} values; send fewer"


def read_request(body: bytes) -> RequestInfo:
    """Read `model` and `stream` once; of the rest only that it is JSON, and numbers that engines can read.

    Numbers are looked at in bodies up to 1 MB and 50,000 values.

    Raises: `InvalidBody` for broken JSON or UTF-8, for what is too deep, too much or too large a number, and for a
    missing, duplicate or non-string `model`.
    Cost: 3 µs at 1 KiB, 35 µs at 64 KiB of text, 0.02 µs a token id; a body with `\\u006` escapes or several `"model"`
    is walked: ten times that.
    """
    if len(body) > bounds.VALUES_MAX and bounds.has_too_many_values(body):
        raise InvalidBody("invalid_json", _TOO_MUCH)
    fields: _Fields | None = None
    model: Any = None
    stream: Any = None
    wants_usage = several = False
    if not bounds.is_acceptable(body):
        fields = _read_fields(body)
    else:
        try:
            whole = _decode_whole(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            _read_fields(body)  # has the sentence for everything but numbers
            raise members.too_large(body) from None
        model, stream = whole.get("model"), whole.get("stream")
        several = whole.get("n") not in _ONE or whole.get("prompt").__class__ is list
        has_options = "stream_options" in whole
        if has_options:  # those that ask for usage are never walked or written again
            options = whole["stream_options"]
            wants_usage = options.__class__ is dict and options.get("include_usage") is True
        if model.__class__ is not str or stream.__class__ not in _FLAG or has_options is not wants_usage:
            fields = _read_fields(body)
    if bounds.is_too_deep(body):
        raise InvalidBody("invalid_json", _TOO_DEEP)
    # `find`, because `in` first takes its bytes for a number, in vain; one byte, because longer needles take longer.
    escaped = body.find(b"\\") >= 0 and body.find(_ESCAPED) >= 0
    plain = not escaped and 0 < body.find(_MODEL) == body.rfind(_MODEL)
    if fields is not None:
        return _ask_with_options(body, fields, plain)
    if not plain:
        _walk(body)
    if not model:
        raise _unnamed()
    return RequestInfo(model, stream is True, wants_usage, wants_usage, plain, several)


def _ask_with_options(body: bytes, fields: _Fields, plain: bool) -> RequestInfo:
    options = fields.stream_options
    wants_usage = isinstance(options, _StreamOptions) and bool(options.include_usage)
    # Options without usage are walked now because `rewrite` may walk them later, when it is too late to refuse.
    if not plain or (options is not msgspec.UNSET and not wants_usage):
        _walk(body)
    if not fields.model:
        raise _unnamed()
    several = bytes(fields.n) not in (b"null", b"1") or bytes(fields.prompt).startswith(b"[")
    return RequestInfo(fields.model, bool(fields.stream), wants_usage, options is not msgspec.UNSET, plain, several)


def _unnamed() -> InvalidBody:
    return InvalidBody("invalid_request", "`model` is empty; name a model", "model")


def _read_fields(body: bytes) -> _Fields:
    """The fields, with all else skipped, numbers of any size too."""
    try:
        fields = _decode_fields(body)
        if not body.isascii():
            body.decode()  # skipped fields are not validated by the decoder
    except msgspec.ValidationError as error:
        raise _invalid_field(error) from None
    except RecursionError:
        raise InvalidBody("invalid_json", _TOO_DEEP) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidBody(
            "invalid_json", f"the request body is not valid JSON: {error}{members.no_number(body, error)}"
        ) from None
    return fields


def _walk(body: bytes) -> None:
    """Refuse what `rewrite` could not handle."""
    members = top_level(body)
    names = [name for name, _, _ in members]
    if names.count("model") > 1:
        raise InvalidBody("invalid_request", "`model` is given twice; give it once", "model")
    for name, start, end in members:
        if name == "stream_options" and body.startswith(b"{", start):
            top_level(body[start:end])


class _Lengths(msgspec.Struct):
    # Raw, because a wrong type is for the engine to refuse: here they only tell how long an answer may get.
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    max_output_tokens: msgspec.Raw = msgspec.Raw()


_decode_lengths = msgspec.json.Decoder(_Lengths).decode


def output_tokens_max(body: bytes) -> int:
    """How many tokens the client allows an answer to have, 0 where it sets no limit; of a body that `read_ask` took."""
    lengths = _decode_lengths(body)
    for raw in (lengths.max_completion_tokens, lengths.max_tokens, lengths.max_output_tokens):
        digits = bytes(raw)
        if digits.isdigit() and len(digits) < 10:
            return int(digits)
    return 0


def _invalid_field(error: msgspec.ValidationError) -> InvalidBody:
    match = _FIELD_PATH.search(str(error))
    param = (match[1] or match[2]) if match else None
    if param == "model":
        missing = "missing" in str(error)
        what = "`model` is missing; name the model you want" if missing else "`model` must be a string"
        return InvalidBody("invalid_request", what, "model")
    return InvalidBody("invalid_request", f"invalid request body: {error}", param or None)


_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode
_MODEL_VALUE = re.compile(rb'("model"[ \t\r\n]*:[ \t\r\n]*)"(?:[^"\\]|\\.)*"')


def rewrite(body: bytes, ask: RequestInfo, upstream_name: str, add_usage: bool) -> bytes:
    """The body for one engine: its own name for the model, and usage asked for; all other bytes as they came."""
    rename = upstream_name != ask.model
    if not rename and not add_usage:
        return body
    if ask.plain and not (add_usage and ask.has_stream_options):
        if rename:
            name = msgspec.json.encode(upstream_name)
            body = _MODEL_VALUE.sub(lambda match: match[1] + name, body, count=1)
        if add_usage:
            brace = body.index(b"{") + 1
            body = b'%b"stream_options":{"include_usage":true},%b' % (body[:brace], body[brace:])
        return body
    return _rewrite_walked(body, ask, upstream_name if rename else None, add_usage)


def _rewrite_walked(body: bytes, ask: RequestInfo, upstream_name: str | None, add_usage: bool) -> bytes:
    for name, start, end in reversed(top_level(body)):
        if name == "model" and upstream_name is not None:
            body = body[:start] + msgspec.json.encode(upstream_name) + body[end:]
        elif name == "stream_options" and add_usage:
            options = {**(_decode_options(body[start:end]) or {}), "include_usage": True}
            body = body[:start] + msgspec.json.encode(options) + body[end:]
    if add_usage and not ask.has_stream_options:
        brace = body.index(b"{") + 1
        body = b'%b"stream_options":{"include_usage":true},%b' % (body[:brace], body[brace:])
    return body


# --- errors -----------------------------------------------------------------------------------------------------------

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class _ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI shapes it."""
    kind = _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "server_error")
    return msgspec.json.encode(_ErrorBody(_ErrorDetail(message, kind, param, code)))


def error_event(code: str, message: str) -> bytes:
    """An error inside a stream: both official SDKs raise on it. FAULTS.md section 1."""
    return b"data: %b\n\n" % error_body(502, code, message)


def event_of_body(body: bytes) -> bytes:
    """A whole JSON answer, an error say, as the only event of a stream that has begun."""
    try:
        return b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(msgspec.json.decode(body))
    except (msgspec.MsgspecError, RecursionError):
        return error_event("upstream_error", "the upstream answered with something that is not JSON")


def models_body(models: dict[str, str]) -> bytes:
    """The answer to `GET /v1/models`. Shape: `models` maps a name to who owns it."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in sorted(models.items())]
    return msgspec.json.encode({"object": "list", "data": data})


def model_body(name: str, owner: str) -> bytes:
    """The answer to `GET /v1/models/NAME`."""
    return msgspec.json.encode({"id": name, "object": "model", "created": 0, "owned_by": owner})


# --- what an event means ----------------------------------------------------------------------------------------------


class EventMeaning(Enum):
    """What an event of a stream is to a relay."""

    CONTENT = "content"
    OTHER = "other"  # well formed, and neither content nor an end: a role, a lifecycle event
    FINISH = "finish"  # carries a finish_reason
    USAGE = "usage"  # carries nothing but usage
    DONE = "done"
    COMMENT = "comment"
    ERROR = "error"
    MALFORMED = "malformed"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, under the names of either API."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    input_tokens: int | None = 0
    output_tokens: int | None = 0

    @property
    def prompt(self) -> int:
        """Prompt tokens."""
        return self.prompt_tokens or self.input_tokens or 0

    @property
    def output(self) -> int:
        """Output tokens."""
        return self.completion_tokens or self.output_tokens or 0


_NONE = msgspec.Raw(b"null")


class _Delta(msgspec.Struct):
    content: msgspec.Raw = _NONE
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: msgspec.Raw = _NONE
    function_call: msgspec.Raw = _NONE


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None
    delta: _Delta | None = None
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = _NONE
    type: str | None = None
    response: "_Answer | None" = None


class _Answer(msgspec.Struct):
    usage: Usage | None = None
    error: msgspec.Raw = _NONE


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_EMPTY_VALUES = (b"null", b'""', b"[]", b"{}")
_RESPONSES_ENDS = frozenset({"response.completed", "response.incomplete"})
_RESPONSES_ERRORS = frozenset({"response.failed", "error"})
_NO_FINISH = frozenset({"error", "abort"})  # the engine gave up, and SDKs would take it for a good end
_ERROR_FIELDS = (b"event: error\n", b"event:error\n", b"event: error\r", b"event:error\r")


def classify_event(event: bytes) -> tuple[EventMeaning, Usage | None]:
    """What one whole event means. Cost: 0.8 µs; the relay calls it only where one `find` does not settle it."""
    data = sse.data_of(event)
    if data is None:
        return EventMeaning.COMMENT, None
    if data.rstrip(b" \t") == b"[DONE]":  # clients compare the begin, so with a space before it, it is none
        return EventMeaning.DONE, None
    try:
        if not data.isascii():
            data.decode()
        decoded = _decode_event(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return EventMeaning.MALFORMED, None
    if bytes(decoded.error) != b"null" or event.startswith(_ERROR_FIELDS):
        return EventMeaning.ERROR, None
    if decoded.type is not None:
        return _understand_typed(decoded)
    usage = decoded.usage
    if not decoded.choices:
        return (EventMeaning.USAGE if usage is not None else EventMeaning.OTHER), usage
    if any(choice.finish_reason for choice in decoded.choices):
        gave_up = any(choice.finish_reason in _NO_FINISH for choice in decoded.choices)
        return (EventMeaning.ERROR if gave_up else EventMeaning.FINISH), usage
    if any(_has_content(choice) for choice in decoded.choices):
        return EventMeaning.CONTENT, usage
    return EventMeaning.OTHER, usage


def _understand_typed(decoded: _Event) -> tuple[EventMeaning, Usage | None]:
    kind = decoded.type or ""
    usage = decoded.response.usage if decoded.response is not None else decoded.usage
    if kind in _RESPONSES_ENDS:
        return EventMeaning.FINISH, usage
    if kind in _RESPONSES_ERRORS:
        return EventMeaning.ERROR, usage
    return (EventMeaning.CONTENT if kind.endswith(".delta") else EventMeaning.OTHER), None


def _has_content(choice: _Choice) -> bool:
    if choice.text:
        return True
    delta = choice.delta
    if delta is None:
        return False
    raws = (delta.content, delta.tool_calls, delta.function_call)
    if any(bytes(raw) not in _EMPTY_VALUES for raw in raws):
        return True
    return bool(delta.reasoning_content or delta.reasoning or delta.refusal)


def read_answer(body: bytes) -> tuple[Usage | None, bool]:
    """The usage of a whole answer that is not streamed, and whether it is an error whatever its status says.

    Raises: `Malformed` when it is not a JSON object, which is how a truncated answer looks.
    """
    try:
        answer = _decode_answer(body)
    except (msgspec.MsgspecError, RecursionError):
        raise Malformed(502, "the upstream's answer is not whole JSON", "upstream_error") from None
    return answer.usage, bytes(answer.error) != b"null"


def note_choices(event: bytes, choices: dict[int, bool]) -> None:
    """Keep of an answer with several choices which of them have begun, and whether each has ended."""
    data = sse.data_of(event)
    for choice in (_decode_event(data).choices if data is not None else None) or ():
        choices[choice.index] = bool(choice.finish_reason) or choices.get(choice.index, False)


_MODEL_MEMBER = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")')


def rename_model(data: bytes, upstream_name: bytes, asked_name: bytes) -> bytes:
    """Put the name the client asked for where the engine wrote its own. Shape: both names as JSON strings.

    Only the first member `model` with that name is the answer's own; inside strings quotes are escaped and never match.
    """
    for match in _MODEL_MEMBER.finditer(data):
        if match[1] == upstream_name or (b"\\" in match[1] and _same_text(match[1], upstream_name)):
            return data[: match.start(1)] + asked_name + data[match.end(1) :]
    return data


def other_model_name(data: bytes, asked_name: bytes) -> bytes | None:
    """The name an engine gave its answer or event where that is not the asked one: a dated alias, say."""
    match = _MODEL_MEMBER.search(data)
    if match is None or match[1] == asked_name or _same_text(match[1], asked_name):
        return None
    return match[1]


def _same_text(one: bytes, other: bytes) -> bool:
    """Whether two JSON strings say the same: engines in Python escape what is not ASCII."""
    try:
        return bool(msgspec.json.decode(one) == msgspec.json.decode(other))
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
