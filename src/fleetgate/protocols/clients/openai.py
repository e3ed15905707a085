"""The OpenAI protocol: its paths, requests, errors and model lists; the files `openai_*.py` hold its other parts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fleetgate.protocols import json_checks
from fleetgate.protocols.clients import openai_events, openai_resume
from fleetgate.protocols.clients.base import Headers
from fleetgate.protocols.json_members import InvalidBody, locate_members, nan_hint, number_too_large
from fleetgate.protocols.messages import Operation, RequestInfo

TITLE = "OpenAI API"
_NO_MARK = b"\x00"  # JSON text never contains this byte
_DONE = b"data: [DONE]\n\n"
OPERATIONS: Mapping[bytes, Operation] = {
    b"/v1/chat/completions": Operation("chat", b"/chat/completions", b'"finish_reason":null', _DONE, usage_option=True),
    b"/v1/completions": Operation("completions", b"/completions", b'"finish_reason":null', _DONE, usage_option=True),
    b"/v1/embeddings": Operation("embeddings", b"/embeddings", _NO_MARK, _DONE, streams=False),
    b"/v1/responses": Operation("responses", b"/responses", b'"type":"response.output_text.delta"'),
}
MODELS_PATH = b"/v1/models"
# Engines that know `stream_options.include_usage`. Others may refuse a field that they do not know.
USAGE_ENGINES = frozenset({"vllm", "sglang", "llamacpp", "tensorrt-llm"})
PROMPT_MARKS: Sequence[bytes] = (b'"messages"', b'"prompt"', b'"input"')
EVENT_BEGINS: tuple[bytes, ...] = (b"data: {", b"event: response.output_text.delta\ndata: {")
ERROR_TYPE = b"application/json"
CREDENTIAL_HINT = "Authorization: Bearer <key>"

_REQUEST_HEADERS = (b"accept", b"traceparent", b"tracestate", b"openai-beta", b"x-session-id")
_RESPONSE_HEADERS = (b"content-type", b"openai-processing-ms", b"openai-version", b"openai-model")

classify_event = openai_events.classify_event
read_answer = openai_events.read_answer
status_of_error = openai_events.status_of_error
note_choices = openai_events.note_choices
rename_model = openai_events.rename_model
other_model_name = openai_events.other_model_name
resume_methods = openai_resume.resume_methods
new_transcript = openai_resume.new_transcript
new_splicer = openai_resume.new_splicer
resume_body = openai_resume.resume_body
resume_path = openai_resume.resume_path


# --- heads ------------------------------------------------------------------------------------------------------------


def methods_of(path: bytes) -> bytes:
    """The methods of a path as an `Allow` header lists them; empty for an unknown path."""
    if path in OPERATIONS:
        return b"POST, OPTIONS"
    if path == MODELS_PATH or path.startswith(MODELS_PATH + b"/"):
        return b"GET, HEAD, OPTIONS"
    return b""


def authorization_of(headers: Headers) -> bytes:
    """The client's credential in the form `Bearer KEY`; empty if it sent none."""
    return headers.get(b"authorization", b"")


def credential_lines(credential: str) -> bytes:
    """The header lines that carry an Endpoint's credential; empty for an Endpoint without one."""
    return f"authorization: Bearer {credential}\r\n".encode() if credential else b""


def request_headers(headers: Headers) -> bytes:
    """The header lines of a request that the Endpoint gets too: never the client's credential or cookies."""
    return b"".join([b"%b: %b\r\n" % (name, headers[name]) for name in _REQUEST_HEADERS if name in headers])


def response_headers(headers: Headers) -> bytes:
    """The header lines of a response that the client gets too. Source: faults.md row 27."""
    return b"".join([b"%b: %b\r\n" % (name, headers[name]) for name in _RESPONSE_HEADERS if name in headers])


# --- parsing a request ------------------------------------------------------------------------------------------------


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Fields(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | msgspec.UnsetType | None = msgspec.UNSET
    n: msgspec.Raw = msgspec.Raw(b"null")
    prompt: msgspec.Raw = msgspec.Raw(b"null")


_MODEL = b'"model"'
_ESCAPED = b"\\u006"  # every escape of a letter of `model` begins with it
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_whole = msgspec.json.Decoder(dict[str, Any]).decode
_FLAG = frozenset({bool, type(None)})
_ONE = (None, 1)
_FIELD_PATH = re.compile(r"at `\$\.?([\w.]*)`|field `(\w+)`")

_TOO_DEEP = (
    f"the request body nests deeper than {json_checks.DEPTH_MAX} levels, "
    f"or has more than {json_checks.CONTAINERS_MAX} objects and arrays; flatten or split it"
)
_TOO_MANY_VALUES = f"the request body has more than {json_checks.VALUES_MAX} values; send fewer"


def parse_request(body: bytes) -> RequestInfo:
    """Read `model`, `stream` and what else routing needs, and check that the rest is JSON that engines can read.

    Numbers are checked in bodies of up to 1 MB and 50,000 values.

    Raises: `InvalidBody` for broken JSON or UTF-8, for too much depth, too many values and too large numbers, and for
    a missing, duplicate or non-string `model`.
    Cost: 3 µs at 1 KiB, 35 µs at 64 KiB of text, 0.02 µs a token id. A body with `\\u006` escapes or several `"model"`
    is searched member by member: ten times that.
    """
    if len(body) > json_checks.VALUES_MAX and json_checks.has_too_many_values(body):
        raise InvalidBody("invalid_json", _TOO_MANY_VALUES)
    fields: _Fields | None = None
    model: Any = None
    stream: Any = None
    wants_usage = several = False
    if not json_checks.is_small(body):
        fields = _read_fields(body)
    else:
        try:
            whole = _decode_whole(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            _read_fields(body)  # raises the error for all causes but numbers
            raise number_too_large(body) from None
        model, stream = whole.get("model"), whole.get("stream")
        several = whole.get("n") not in _ONE or whole.get("prompt").__class__ is list
        has_options = "stream_options" in whole
        if has_options:  # a request that asks for usage is never rewritten for it
            options = whole["stream_options"]
            wants_usage = options.__class__ is dict and options.get("include_usage") is True
        if model.__class__ is not str or stream.__class__ not in _FLAG or has_options is not wants_usage:
            fields = _read_fields(body)
    if json_checks.is_too_deep(body):
        raise InvalidBody("invalid_json", _TOO_DEEP)
    # `find` is faster than `in`, which first tries to read its operand as a number. One byte is found faster than many.
    escaped = body.find(b"\\") >= 0 and body.find(_ESCAPED) >= 0
    plain = not escaped and 0 < body.find(_MODEL) == body.rfind(_MODEL)
    if fields is not None:
        return _info_of_fields(body, fields, plain)
    if not plain:
        _check_members(body)
    if not model:
        raise _empty_model()
    return RequestInfo(model, stream is True, wants_usage, wants_usage, plain, several)


def _info_of_fields(body: bytes, fields: _Fields, plain: bool) -> RequestInfo:
    options = fields.stream_options
    wants_usage = isinstance(options, _StreamOptions) and bool(options.include_usage)
    # `rewrite` may search the options of a request that does not ask for usage. It cannot refuse them: check them now.
    if not plain or (options is not msgspec.UNSET and not wants_usage):
        _check_members(body)
    if not fields.model:
        raise _empty_model()
    several = bytes(fields.n) not in (b"null", b"1") or bytes(fields.prompt).startswith(b"[")
    return RequestInfo(fields.model, bool(fields.stream), wants_usage, options is not msgspec.UNSET, plain, several)


def _empty_model() -> InvalidBody:
    return InvalidBody("invalid_request", "`model` is empty; name a model", "model")


def _read_fields(body: bytes) -> _Fields:
    """Read the fields and skip the rest, numbers of any size included."""
    try:
        fields = _decode_fields(body)
        if not body.isascii():
            body.decode()  # the decoder does not validate skipped fields
    except msgspec.ValidationError as error:
        raise _invalid_field(error) from None
    except RecursionError:
        raise InvalidBody("invalid_json", _TOO_DEEP) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"the request body is not valid JSON: {error}{nan_hint(body, error)}"
        raise InvalidBody("invalid_json", message) from None
    return fields


def _check_members(body: bytes) -> None:
    """Refuse what `rewrite` could not handle."""
    members = locate_members(body)
    names = [name for name, _, _ in members]
    if names.count("model") > 1:
        raise InvalidBody("invalid_request", "`model` is given twice; give it once", "model")
    for name, start, end in members:
        if name == "stream_options" and body.startswith(b"{", start):
            locate_members(body[start:end])


def _invalid_field(error: msgspec.ValidationError) -> InvalidBody:
    match = _FIELD_PATH.search(str(error))
    param = (match[1] or match[2]) if match else None
    if param == "model":
        is_missing = "missing" in str(error)
        message = "`model` is missing; name the model you want" if is_missing else "`model` must be a string"
        return InvalidBody("invalid_request", message, "model")
    return InvalidBody("invalid_request", f"invalid request body: {error}", param or None)


class _Lengths(msgspec.Struct):
    # Raw: a value of another type is the engine's to refuse.
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    max_output_tokens: msgspec.Raw = msgspec.Raw()


_decode_lengths = msgspec.json.Decoder(_Lengths).decode


def output_tokens_max(body: bytes) -> int:
    """The largest response that the request allows, 0 for no limit. Shape: `parse_request` accepted the body."""
    lengths = _decode_lengths(body)
    for raw in (lengths.max_completion_tokens, lengths.max_tokens, lengths.max_output_tokens):
        digits = bytes(raw)
        if digits.isdigit() and len(digits) < 10:
            return int(digits)
    return 0


# --- rewriting a request ----------------------------------------------------------------------------------------------

_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode
_MODEL_VALUE = re.compile(rb'("model"[ \t\r\n]*:[ \t\r\n]*)"(?:[^"\\]|\\.)*"')


def rewrite(body: bytes, info: RequestInfo, upstream_name: str, add_usage: bool) -> bytes:
    """The body for one engine: its own name for the model, usage if asked for, all other bytes unchanged."""
    rename = upstream_name != info.model
    if not rename and not add_usage:
        return body
    if info.plain and not (add_usage and info.has_stream_options):
        if rename:
            name = msgspec.json.encode(upstream_name)
            body = _MODEL_VALUE.sub(lambda match: match[1] + name, body, count=1)
        if add_usage:
            brace = body.index(b"{") + 1
            body = b'%b"stream_options":{"include_usage":true},%b' % (body[:brace], body[brace:])
        return body
    return _rewrite_members(body, info, upstream_name if rename else None, add_usage)


def _rewrite_members(body: bytes, info: RequestInfo, upstream_name: str | None, add_usage: bool) -> bytes:
    for name, start, end in reversed(locate_members(body)):
        if name == "model" and upstream_name is not None:
            body = body[:start] + msgspec.json.encode(upstream_name) + body[end:]
        elif name == "stream_options" and add_usage:
            options = {**(_decode_options(body[start:end]) or {}), "include_usage": True}
            body = body[:start] + msgspec.json.encode(options) + body[end:]
    if add_usage and not info.has_stream_options:
        brace = body.index(b"{") + 1
        body = b'%b"stream_options":{"include_usage":true},%b' % (body[:brace], body[brace:])
    return body


# --- responses of the gateway itself ----------------------------------------------------------------------------------

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
    """An error as a whole body."""
    kind = _TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "server_error")
    return msgspec.json.encode(_ErrorBody(_ErrorDetail(message, kind, param, code)))


def error_event(code: str, message: str) -> bytes:
    """An error inside a stream. Both official SDKs raise it."""
    return b"data: %b\n\n" % error_body(502, code, message)


def event_of_body(body: bytes) -> bytes:
    """A whole response, an error for example, as the last events of a stream that has begun."""
    try:
        return b"data: %b\n\n%b" % (msgspec.json.encode(msgspec.json.decode(body)), _DONE)
    except (msgspec.MsgspecError, RecursionError):
        return error_event("upstream_error", "the upstream's response is not JSON")


def models_body(models: Mapping[str, str]) -> bytes:
    """The response to `GET /v1/models`. Shape: `models` maps a name to its owner."""
    data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in sorted(models.items())]
    return msgspec.json.encode({"object": "list", "data": data})


def model_body(name: str, owner: str) -> bytes:
    """The response to `GET /v1/models/NAME`."""
    return msgspec.json.encode({"id": name, "object": "model", "created": 0, "owned_by": owner})
