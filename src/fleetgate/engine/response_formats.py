"""How a simulated engine's answers look: one shape per operation, whole or as a stream of events."""

import base64
import struct
from typing import Protocol

import msgspec

from fleetgate.engine.request_parser import EmbeddingRequest, GenerationRequest
from fleetgate.engine.text_generator import TextGenerator

_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class ResponseFormat(Protocol):
    """One answer in the making: `first`, one `event` for each piece, `last`; or `whole`."""

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""

    def first(self) -> bytes:
        """What a stream begins with."""

    def event(self, piece: str) -> bytes:
        """One token as an event."""

    def last(self) -> bytes:
        """What a stream ends with."""


def _data(value: object) -> bytes:
    return b"data: %b\n\n" % _json(value)


def _usage(ask: GenerationRequest) -> dict[str, int]:
    output = len(ask.pieces)
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": output,
        "total_tokens": ask.prompt_tokens + output,
    }


class _ChunkReply:
    """What chat completions and legacy completions have in common."""

    kind = ""

    def __init__(self, ask: GenerationRequest, answer_id: str, created_s: int) -> None:
        self._ask = ask
        self._base: dict[str, object] = {"id": answer_id, "object": self.kind, "created": created_s, "model": ask.model}
        mark = "\x00"
        before, after = _data(self._chunk(self._content(mark), None)).split(_json(mark))
        self._before, self._after = before, after

    def _content(self, piece: str) -> dict[str, object]:
        raise NotImplementedError

    def _chunk(self, content: dict[str, object], finish_reason: str | None) -> dict[str, object]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._base, "choices": [choice]}

    def event(self, piece: str) -> bytes:
        return self._before + _json(piece) + self._after

    def _end(self, content: dict[str, object]) -> bytes:
        end = _data(self._chunk(content, self._ask.finish_reason))
        if self._ask.include_usage:
            end += _data({**self._base, "choices": [], "usage": _usage(self._ask)})
        return end + DONE


class ChatFormat(_ChunkReply):
    """`/v1/chat/completions`."""

    kind = "chat.completion.chunk"

    def _content(self, piece: str) -> dict[str, object]:
        if self._ask.tool:
            return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}}
        return {"delta": {"content": piece}}

    def _call(self, arguments: str) -> dict[str, object]:
        call_id = f"call_{self._base['id']}"
        return {"id": call_id, "type": "function", "function": {"name": self._ask.tool, "arguments": arguments}}

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        message: dict[str, object] = {"role": "assistant", "content": self._ask.text}
        if self._ask.tool:
            message = {"role": "assistant", "content": None, "tool_calls": [self._call(self._ask.text)]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._ask.finish_reason}
        return _json({**self._base, "object": "chat.completion", "choices": [choice], "usage": _usage(self._ask)})

    def first(self) -> bytes:
        """The role, and for a tool call its name."""
        delta: dict[str, object] = {"role": "assistant", "content": None if self._ask.tool else ""}
        if self._ask.tool:
            delta["tool_calls"] = [{"index": 0, **self._call("")}]
        return _data(self._chunk({"delta": delta}, None))

    def last(self) -> bytes:
        """The finish reason, usage where it was asked for, and the mark that ends the stream."""
        return self._end({"delta": {}})


class CompletionFormat(_ChunkReply):
    """`/v1/completions`."""

    kind = "text_completion"

    def _content(self, piece: str) -> dict[str, object]:
        return {"text": piece}

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        return _json({**self._chunk({"text": self._ask.text}, self._ask.finish_reason), "usage": _usage(self._ask)})

    def first(self) -> bytes:
        """Nothing: the first event is the first token."""
        return b""

    def last(self) -> bytes:
        """The finish reason, usage where it was asked for, and the mark that ends the stream."""
        return self._end({"text": ""})


class ResponsesFormat:
    """`/v1/responses`: numbered, named events that build one item."""

    def __init__(self, ask: GenerationRequest, answer_id: str, created_s: int) -> None:
        self._ask = ask
        self._id = answer_id
        self._item_id = ("fc_" if ask.tool else "msg_") + answer_id
        self._created_s = created_s
        self._number = -1
        kind = "function_call_arguments" if ask.tool else "output_text"
        self._stream = f"response.{kind}"

    def _event(self, kind: str, **fields: object) -> bytes:
        self._number += 1
        event = {"type": kind, "sequence_number": self._number, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json(event))

    def _part(self, text: str) -> dict[str, object]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status: str, text: str) -> dict[str, object]:
        head: dict[str, object] = {"id": self._item_id, "status": status}
        if self._ask.tool:
            call_id = f"call_{self._id}"
            return {**head, "type": "function_call", "call_id": call_id, "name": self._ask.tool, "arguments": text}
        content = [] if status == "in_progress" else [self._part(text)]
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _response(self, done: bool) -> dict[str, object]:
        ask, output = self._ask, len(self._ask.pieces)
        cut = ask.finish_reason == "length"
        status = ("incomplete" if cut else "completed") if done else "in_progress"
        usage = {
            "input_tokens": ask.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": ask.prompt_tokens + output,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if done and cut else None,
            "instructions": None,
            "metadata": {},
            "model": ask.model,
            "output": [self._item(status, ask.text)] if done else [],
            "parallel_tool_calls": False,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage if done else None,
        }

    def _place(self) -> dict[str, object]:
        place: dict[str, object] = {"item_id": self._item_id, "output_index": 0}
        return place if self._ask.tool else {**place, "content_index": 0}

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        return _json(self._response(done=True))

    def first(self) -> bytes:
        """The response and its one item, both still empty."""
        begun = (
            self._event("response.created", response=self._response(done=False))
            + self._event("response.in_progress", response=self._response(done=False))
            + self._event("response.output_item.added", output_index=0, item=self._item("in_progress", ""))
        )
        if self._ask.tool:
            return begun
        return begun + self._event("response.content_part.added", **self._place(), part=self._part(""))

    def event(self, piece: str) -> bytes:
        """One token."""
        extra: dict[str, object] = {} if self._ask.tool else {"logprobs": []}
        return self._event(f"{self._stream}.delta", **self._place(), delta=piece, **extra)

    def last(self) -> bytes:
        """The item and the response once more, whole."""
        text, place = self._ask.text, self._place()
        status = "incomplete" if self._ask.finish_reason == "length" else "completed"
        if self._ask.tool:
            end = self._event(f"{self._stream}.done", **place, name=self._ask.tool, arguments=text)
        else:
            end = self._event(f"{self._stream}.done", **place, text=text, logprobs=[])
            end += self._event("response.content_part.done", **place, part=self._part(text))
        end += self._event("response.output_item.done", output_index=0, item=self._item(status, text))
        return end + self._event(f"response.{status}", response=self._response(done=True))


def embeddings_body(ask: EmbeddingRequest, seed: int) -> bytes:
    """The answer to `/v1/embeddings`."""
    data = []
    for index, text in enumerate(ask.inputs):
        vector: object = TextGenerator(seed, text).vector(ask.dimensions)
        if ask.base64:
            packed = struct.pack(f"<{ask.dimensions}f", *TextGenerator(seed, text).vector(ask.dimensions))
            vector = base64.b64encode(packed).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens}
    return _json({"object": "list", "data": data, "model": ask.model, "usage": usage})
