"""Resuming by prefill: the engine is asked to continue the text that the client has."""

import msgspec

from fleetgate.protocols.resume.transcript import Transcript

_LENGTHS = ("max_completion_tokens", "max_tokens")


def prefill_body(body: bytes, transcript: Transcript, engine: str) -> bytes | None:
    """The request that makes an engine continue the text; None if the text cannot be given as a prefix.

    Source: `continue_final_message` of vLLM and SGLang; llama.cpp continues a last message of the assistant.
    """
    runs = transcript.runs
    if not transcript.whole or len(runs) != 1 or runs[0][0] not in ("content", "text"):
        return None
    try:
        request = msgspec.json.decode(body)
    except msgspec.MsgspecError:  # a number out of range, for example
        return None
    transcript.holds_back = bool(request.get("stop"))
    text, _, tokens = transcript.prefix()
    if not text:
        return None
    for name in _LENGTHS:
        if request.get(name) is not None:
            if type(request[name]) is not int or request[name] <= tokens:
                return None
            request[name] -= tokens
    if runs[0][0] == "text":
        if not isinstance(request.get("prompt"), str):
            return None
        request["prompt"] += text
        return msgspec.json.encode(request)
    if not isinstance(request.get("messages"), list):
        return None
    request["messages"] = [*request["messages"], {"role": "assistant", "content": text}]
    return msgspec.json.encode({**request, **prefix_fields(engine)})


def prefix_fields(engine: str) -> dict[str, bool]:
    """The fields that make an engine continue the last message, the assistant's, instead of starting a new one."""
    return {} if engine == "llamacpp" else {"continue_final_message": True, "add_generation_prompt": False}
