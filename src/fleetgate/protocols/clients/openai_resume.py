"""Resuming OpenAI streams: which methods a request allows, and which transcript, splicer and request they use.

REPLAY sends the request again unchanged and compares the new stream with what the client has. PREFILL asks the engine
to continue the text. TOKENS gives the engine the token ids of prompt and output.
"""

import msgspec

from fleetgate.protocols.messages import Operation, ResumeMethod
from fleetgate.protocols.resume.prefill import prefill_body
from fleetgate.protocols.resume.responses import ResponseSplicer, ResponseTranscript, response_resume_methods
from fleetgate.protocols.resume.splice import StreamSplicer
from fleetgate.protocols.resume.token_ids import COMPLETIONS, TokenSplicer, tokens_body
from fleetgate.protocols.resume.transcript import Transcript

_NONE = msgspec.Raw(b"null")


class _ResumeFields(msgspec.Struct):
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


_decode_fields = msgspec.json.Decoder(_ResumeFields).decode
_UNSET = (b"null", b"false", b"0", b"[]", b"{}")
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
    """How the response to this request may continue elsewhere; empty if it cannot. Cost: 1 µs at 1 KiB."""
    if operation.name == "responses":
        return response_resume_methods(body)
    if operation.name not in ("chat", "completions"):
        return frozenset()
    try:
        fields = _decode_fields(body)
    except msgspec.MsgspecError:
        return frozenset()
    several = (fields.n or 1) > 1 or (fields.best_of or 1) > 1
    beyond_text = fields.modalities is not None and fields.modalities != ["text"]
    if several or beyond_text or any(bytes(raw) not in _UNSET for raw in (fields.logprobs, fields.top_logprobs)):
        return frozenset()
    methods = set()
    if fields.temperature == 0 or fields.top_k == 1:
        methods.add(ResumeMethod.REPLAY)
    guided = any(bytes(getattr(fields, name)) not in _UNSET for name in _GUIDES)
    listed = operation.name == "completions" and not bytes(fields.prompt).startswith(b'"')
    if fields.return_token_ids:
        # Never by prefill: an engine that tokenises the text again may continue with ids that do not fit the client's.
        if not guided and not fields.echo:
            methods.add(ResumeMethod.TOKENS)
    elif not guided and not listed and not fields.echo:
        methods.add(ResumeMethod.PREFILL)
    return frozenset(methods)


def new_transcript(operation: Operation, token_mark: int) -> Transcript:
    """An empty record of what a client receives."""
    return ResponseTranscript() if operation.name == "responses" else Transcript(token_mark)


def new_splicer(transcript: Transcript, method: ResumeMethod, model: str, operation: Operation) -> StreamSplicer:
    """Joins a new response to the recorded one. Shape: `model` is the name that the client asked for."""
    if isinstance(transcript, ResponseTranscript):
        return ResponseSplicer(transcript, model)
    if method is ResumeMethod.TOKENS:
        return TokenSplicer(transcript, model, operation)
    return StreamSplicer(transcript, method, model)


def resume_body(method: ResumeMethod, body: bytes, transcript: Transcript, engine: str) -> bytes | None:
    """The request that makes an engine continue; None if an exact continuation is impossible."""
    if method is ResumeMethod.REPLAY:
        return body
    if method is ResumeMethod.TOKENS:
        return tokens_body(body, transcript)
    return prefill_body(body, transcript, engine)


def resume_path(method: ResumeMethod, path: bytes) -> bytes:
    """The path of that request."""
    return COMPLETIONS if method is ResumeMethod.TOKENS else path
