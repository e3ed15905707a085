"""A toy client protocol: `POST /say` with a key in `x-say-key`, streams of words, and errors called `oops`.

Tests put this file into `protocols/clients/`. Requests have the members of the OpenAI API; the rest is its own.
"""

from collections.abc import Mapping, Sequence

import msgspec

from fleetgate.protocols import sse
from fleetgate.protocols.clients import openai
from fleetgate.protocols.clients.base import Headers
from fleetgate.protocols.http1 import Malformed
from fleetgate.protocols.messages import EventMeaning, Operation, ResumeMethod, Usage

TITLE = "Say API"
OPERATIONS: Mapping[bytes, Operation] = {b"/say": Operation("say", b"/speak", b'"word":"')}
MODELS_PATH = b"/voices"
USAGE_ENGINES: frozenset[str] = frozenset()
PROMPT_MARKS: Sequence[bytes] = (b'"text"',)
EVENT_BEGINS: tuple[bytes, ...] = (b"event: word\ndata: {",)
ERROR_TYPE = b"application/oops+json"
CREDENTIAL_HINT = "X-Say-Key: <key>"

_REQUEST_HEADERS = (b"x-say-mood",)
_RESPONSE_HEADERS = (b"content-type", b"x-say-voice")
_NONE = msgspec.Raw(b"null")

parse_request = openai.parse_request
rewrite = openai.rewrite
output_tokens_max = openai.output_tokens_max
rename_model = openai.rename_model
other_model_name = openai.other_model_name
new_transcript = openai.new_transcript
new_splicer = openai.new_splicer
resume_body = openai.resume_body


class _Event(msgspec.Struct):
    word: str | None = None
    end: str | None = None
    oops: msgspec.Raw = _NONE
    usage: Usage | None = None


class _Oops(msgspec.Struct):
    status: int = 500


class _Holder(msgspec.Struct):
    oops: _Oops


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_holder = msgspec.json.Decoder(_Holder).decode


def methods_of(path: bytes) -> bytes:
    """POST to say something, GET for the voices."""
    if path in OPERATIONS:
        return b"POST, OPTIONS"
    return b"GET, HEAD, OPTIONS" if path == MODELS_PATH or path.startswith(MODELS_PATH + b"/") else b""


def authorization_of(headers: Headers) -> bytes:
    """The key in `x-say-key`."""
    key = headers.get(b"x-say-key", b"")
    return b"Bearer " + key if key else b""


def credential_lines(credential: str) -> bytes:
    """The credential in `x-say-key`."""
    return f"x-say-key: {credential}\r\n".encode() if credential else b""


def request_headers(headers: Headers) -> bytes:
    """The mood."""
    return b"".join([b"%b: %b\r\n" % (name, headers[name]) for name in _REQUEST_HEADERS if name in headers])


def response_headers(headers: Headers) -> bytes:
    """Type and voice."""
    return b"".join([b"%b: %b\r\n" % (name, headers[name]) for name in _RESPONSE_HEADERS if name in headers])


def classify_event(event: bytes) -> tuple[EventMeaning, Usage | None]:
    """A word is content, `end` ends, `oops` is an error."""
    data = sse.data_of(event)
    if data is None:
        return EventMeaning.COMMENT, None
    try:
        if not data.isascii():
            data.decode()
        decoded = _decode_event(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return EventMeaning.MALFORMED, None
    if bytes(decoded.oops) != b"null":
        return EventMeaning.ERROR, None
    if decoded.end is not None:
        return EventMeaning.FINISH, decoded.usage
    return (EventMeaning.CONTENT if decoded.word else EventMeaning.OTHER), None


def read_answer(body: bytes) -> tuple[Usage | None, bool]:
    """Usage, and whether there is an `oops`."""
    try:
        answer = _decode_event(body)
    except (msgspec.MsgspecError, RecursionError):
        raise Malformed(502, "the upstream's response is not a complete JSON object", "upstream_error") from None
    return answer.usage, bytes(answer.oops) != b"null"


def status_of_error(data: bytes) -> int:
    """The member `status`."""
    try:
        status = _decode_holder(data).oops.status
    except (msgspec.MsgspecError, RecursionError):
        return 500
    return status if 400 <= status < 600 else 500


def note_choices(event: bytes, choices: dict[int, bool]) -> None:
    """There is one choice."""
    choices[0] = classify_event(event)[0] is EventMeaning.FINISH


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """An `oops`."""
    return msgspec.json.encode({"oops": {"type": "say", "status": status, "code": code, "text": message}})


def error_event(code: str, message: str) -> bytes:
    """An `oops` inside a stream."""
    return event_of_body(error_body(502, code, message))


def event_of_body(body: bytes) -> bytes:
    """The body as an event."""
    return b"event: oops\ndata: %b\n\n" % body


def models_body(models: Mapping[str, str]) -> bytes:
    """The voices."""
    return msgspec.json.encode({"voices": sorted(models)})


def model_body(name: str, owner: str) -> bytes:
    """One voice."""
    return msgspec.json.encode({"voice": name})


def resume_methods(body: bytes, operation: Operation) -> frozenset[ResumeMethod]:
    """None."""
    return frozenset()


def resume_path(method: ResumeMethod, path: bytes) -> bytes:
    """The same path."""
    return path
