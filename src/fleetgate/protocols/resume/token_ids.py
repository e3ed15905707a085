"""Resuming by token ids: the ids of prompt and output are the next engine's prompt.

No text is tokenised again, so the continuation is what the first engine would have produced, or could have if it
samples. Only for clients that ask for token ids themselves: to ask on behalf of the others would mean to remove the ids
from every event, 0.5 µs each, for the few streams that break off.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from fleetgate.protocols.messages import Operation, ResumeMethod
from fleetgate.protocols.resume.splice import Mismatch, StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript

COMPLETIONS = b"/v1/completions"
COMPLETION_TOKENS = 16  # the default limit of `/v1/completions`; that of chat is the rest of the context


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields with the same meaning in `/v1/completions` as in chat.
_CARRIED = _names("""
    model stream stream_options temperature top_p top_k min_p repetition_penalty seed logit_bias stop_token_ids
    ignore_eos skip_special_tokens spaces_between_special_tokens bad_words user priority cache_salt
""")
# Fields that the ids already contain, that are computed below, or that `resume_methods` accepts only empty.
_SETTLED = _names("""
    messages prompt max_tokens max_completion_tokens min_tokens return_token_ids n best_of logprobs top_logprobs
    echo stop presence_penalty frequency_penalty tools tool_choice parallel_tool_calls functions function_call
    response_format grammar structured_outputs guided_json guided_regex guided_choice guided_grammar modalities
    add_generation_prompt continue_final_message add_special_tokens chat_template chat_template_kwargs documents
    metadata store service_tier reasoning_effort include_stop_str_in_output
""")
# An engine applies these to its own output only, not to the text that it is given.
_FROM_THE_FIRST = ("stop", "presence_penalty", "frequency_penalty")
_TEXT = frozenset({"content", "text", "reasoning", "reasoning_content"})


def mark_of(model: str, prompt_ids: Sequence[int]) -> int:
    """Identifies model, tokenizer and chat template by the token ids of one prompt. Shape: above 1."""
    digest = hashlib.sha256(msgspec.json.encode([model, list(prompt_ids)])).digest()
    return int.from_bytes(digest[:7]) + 2


def tokens_body(body: bytes, transcript: Transcript) -> bytes | None:
    """The request that makes an engine continue from token ids; None if that would not be exact."""
    runs, prompt = transcript.runs, transcript.prompt_ids
    if not transcript.whole or not transcript.token_mark or prompt is None or transcript.settled <= 0:
        return None
    # Inside of reasoning a completion cannot continue: it has no parser that finds the end of the reasoning.
    if not runs or runs[-1][0] not in ("content", "text") or any(channel not in _TEXT for channel, _ in runs):
        return None
    try:
        request = msgspec.json.decode(body)
    except msgspec.MsgspecError:  # a number out of range, for example
        return None
    if request.keys() - _CARRIED - _SETTLED or any(request.get(name) for name in _FROM_THE_FIRST):
        return None
    length = request.get("max_completion_tokens") or request.get("max_tokens")
    if length is None and "prompt" in request:
        length = COMPLETION_TOKENS
    floor = request.get("min_tokens") or 0
    if type(length) not in (int, type(None)) or type(floor) is not int or (length or 1 << 40) <= transcript.settled:
        return None
    done = transcript.settled
    return msgspec.json.encode(
        {
            **{name: value for name, value in request.items() if name in _CARRIED},
            "prompt": [*prompt, *transcript.ids[:done]],
            "max_tokens": None if length is None else length - done,
            "min_tokens": max(0, floor - done),
            "return_token_ids": True,
        }
    )


class TokenSplicer(StreamSplicer):
    """Joins a stream that continues from token ids; for a chat it makes chat events.

    Ids that the client has without their text, parts of a character, are generated again and compared.
    Shape: `operation` is the one that the client asked for.
    """

    def __init__(self, transcript: Transcript, model: str, operation: Operation) -> None:
        transcript.digest()
        super().__init__(transcript, ResumeMethod.TOKENS, model)
        self._prefilled_tokens = transcript.settled
        self._expected_ids = list(transcript.ids[transcript.settled :])
        self._is_chat = operation.name == "chat"

    def _shape(self, event: dict[str, Any]) -> None:
        event.pop("prompt_token_ids", None)
        if not self._is_chat:
            return
        event["object"] = "chat.completion.chunk"
        for choice in event.get("choices") or ():
            text = choice.pop("text", None)
            choice["delta"] = {"content": text} if text else {}

    def _unread(self, channel: str, text: str) -> str:
        if self._expected_ids:
            raise Mismatch  # text that belongs to none of the ids
        return text
