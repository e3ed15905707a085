"""Going on elsewhere by token ids (R1): the ids of prompt and answer are the next engine's prompt.

No text is cut into tokens anew, so that what follows is what the first engine would have said, or could have where it
samples. Only for answers whose client asked for token ids itself: to ask for them in its place means to cut them out of
every event, 0.5 µs each, for the sake of the few answers that break off.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from fleetgate.protocols.clients.openai import Operation
from fleetgate.protocols.resume.transcript import Mismatch, ResumeMethod, StreamSplicer, Transcript

COMPLETIONS = b"/v1/completions"
COMPLETION_TOKENS = 16  # what an engine gives who sets no limit there; for chat it is all that the context holds


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What `/v1/completions` understands as chat does.
_CARRIED = _names("""
    model stream stream_options temperature top_p top_k min_p repetition_penalty seed logit_bias stop_token_ids
    ignore_eos skip_special_tokens spaces_between_special_tokens bad_words user priority cache_salt
""")
# What is in the ids already, is worked out below, or has no say because `ways_of` lets only empty values through.
_SETTLED = _names("""
    messages prompt max_tokens max_completion_tokens min_tokens return_token_ids n best_of logprobs top_logprobs
    echo stop presence_penalty frequency_penalty tools tool_choice parallel_tool_calls functions function_call
    response_format grammar structured_outputs guided_json guided_regex guided_choice guided_grammar modalities
    add_generation_prompt continue_final_message add_special_tokens chat_template chat_template_kwargs documents
    metadata store service_tier reasoning_effort include_stop_str_in_output
""")
# An engine counts these from its own first token, and looks for a stop in its own text only.
_FROM_THE_FIRST = ("stop", "presence_penalty", "frequency_penalty")
_TEXT = frozenset({"content", "text", "reasoning", "reasoning_content"})


def mark_of(model: str, prompt_ids: Sequence[int]) -> int:
    """What engines of one model, tokenizer and chat template have in common, from the ids of one prompt; above 1."""
    digest = hashlib.sha256(msgspec.json.encode([model, list(prompt_ids)])).digest()
    return int.from_bytes(digest[:7]) + 2


def tokens_body(body: bytes, transcript: Transcript) -> bytes | None:
    """The request that lets an engine go on from token ids; None where that would not be exact."""
    runs, prompt = transcript.runs, transcript.prompt_ids
    if not transcript.whole or not transcript.token_mark or prompt is None or transcript.settled <= 0:
        return None
    # Behind reasoning there is nothing left to parse; inside it, a completion has no parser for its end.
    if not runs or runs[-1][0] not in ("content", "text") or any(channel not in _TEXT for channel, _ in runs):
        return None
    try:
        asked = msgspec.json.decode(body)
    except msgspec.MsgspecError:  # a number that is none, say
        return None
    if asked.keys() - _CARRIED - _SETTLED or any(asked.get(name) for name in _FROM_THE_FIRST):
        return None
    length = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if length is None and "prompt" in asked:
        length = COMPLETION_TOKENS
    floor = asked.get("min_tokens") or 0
    if type(length) not in (int, type(None)) or type(floor) is not int or (length or 1 << 40) <= transcript.settled:
        return None
    said = transcript.settled
    return msgspec.json.encode(
        {
            **{name: value for name, value in asked.items() if name in _CARRIED},
            "prompt": [*prompt, *transcript.ids[:said]],
            "max_tokens": None if length is None else length - said,
            "min_tokens": max(0, floor - said),
            "return_token_ids": True,
        }
    )


class TokenSplicer(StreamSplicer):
    """Joins an answer that goes on from token ids; of a chat it makes chat events.

    Ids that its client has but whose text never came, halves of a character, are said again and compared.
    Shape: `operation` is what the client asked for.
    """

    def __init__(self, transcript: Transcript, model: str, operation: Operation) -> None:
        transcript.digest()
        super().__init__(transcript, ResumeMethod.TOKENS, model)
        self._prefilled_tokens = transcript.settled
        self._owed = list(transcript.ids[transcript.settled :])
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
        if self._owed:
            raise Mismatch  # text for ids that never had any
        return text
