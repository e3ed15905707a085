"""The response formats of a simulated engine: one per operation, whole or as a stream of events."""

import base64
import struct
from typing import Protocol

import msgspec

from fleetgate.engine.request_parser import EmbeddingRequest, GenerationRequest
from fleetgate.engine.text_generator import TextGenerator

_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class ResponseFormat(Protocol):
    """One response: for a stream `first`, one `event` for each piece, `last`; otherwise `whole`."""

    def whole(self) -> bytes:
        """The body of a response that is not streamed."""

    def first(self) -> bytes:
        """The beginning of a stream."""

    def event(self, piece: str) -> bytes:
        """One token as an event."""

    def last(self) -> bytes:
        """The end of a stream."""


def _data(value: object) -> bytes:
    return b"data: %b\n\n" % _json(value)


def _usage(request: GenerationRequest) -> dict[str, int]:
    output = len(request.pieces)
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": output,
        "total_tokens": request.prompt_tokens + output,
    }


class _ChunkFormat:
    """The common part of chat completions and legacy completions."""

    kind = ""

    def __init__(self, request: GenerationRequest, response_id: str, created_s: int) -> None:
        self._request = request
        self._base: dict[str, object] = {
            "id": response_id,
            "object": self.kind,
            "created": created_s,
            "model": request.model,
        }
        placeholder = "\x00"
        before, after = _data(self._chunk(self._content(placeholder), None)).split(_json(placeholder))
        self._before, self._after = before, after

    def _content(self, piece: str) -> dict[str, object]:
        raise NotImplementedError

    def _chunk(self, content: dict[str, object], finish_reason: str | None) -> dict[str, object]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._base, "choices": [choice]}

    def event(self, piece: str) -> bytes:
        return self._before + _json(piece) + self._after

    def _end(self, content: dict[str, object]) -> bytes:
        end = _data(self._chunk(content, self._request.finish_reason))
        if self._request.include_usage:
            end += _data({**self._base, "choices": [], "usage": _usage(self._request)})
        return end + DONE


class ChatFormat(_ChunkFormat):
    """`/v1/chat/completions`."""

    kind = "chat.completion.chunk"

    def _content(self, piece: str) -> dict[str, object]:
        if self._request.tool:
            return {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}}
        return {"delta": {"content": piece}}

    def _call(self, arguments: str) -> dict[str, object]:
        call_id = f"call_{self._base['id']}"
        return {"id": call_id, "type": "function", "function": {"name": self._request.tool, "arguments": arguments}}

    def whole(self) -> bytes:
        """The body of a response that is not streamed."""
        message: dict[str, object] = {"role": "assistant", "content": self._request.text}
        if self._request.tool:
            message = {"role": "assistant", "content": None, "tool_calls": [self._call(self._request.text)]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._request.finish_reason}
        return _json({**self._base, "object": "chat.completion", "choices": [choice], "usage": _usage(self._request)})

    def first(self) -> bytes:
        """The role, and the name of a tool call."""
        delta: dict[str, object] = {"role": "assistant", "content": None if self._request.tool else ""}
        if self._request.tool:
            delta["tool_calls"] = [{"index": 0, **self._call("")}]
        return _data(self._chunk({"delta": delta}, None))

    def last(self) -> bytes:
        """The finish reason, usage if requested, and the marker that ends the stream."""
        return self._end({"delta": {}})


class CompletionFormat(_ChunkFormat):
    """`/v1/completions`."""

    kind = "text_completion"

    def _content(self, piece: str) -> dict[str, object]:
        return {"text": piece}

    def whole(self) -> bytes:
        """The body of a response that is not streamed."""
        return _json(
            {**self._chunk({"text": self._request.text}, self._request.finish_reason), "usage": _usage(self._request)}
        )

    def first(self) -> bytes:
        """Nothing: the first event is the first token."""
        return b""

    def last(self) -> bytes:
        """The finish reason, usage if requested, and the marker that ends the stream."""
        return self._end({"text": ""})


class ResponsesFormat:
    """`/v1/responses`: numbered, named events that build one item."""

    def __init__(self, request: GenerationRequest, response_id: str, created_s: int) -> None:
        self._request = request
        self._id = response_id
        self._item_id = ("fc_" if request.tool else "msg_") + response_id
        self._created_s = created_s
        self._number = -1
        kind = "function_call_arguments" if request.tool else "output_text"
        self._stream = f"response.{kind}"

    def _event(self, kind: str, **fields: object) -> bytes:
        self._number += 1
        event = {"type": kind, "sequence_number": self._number, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json(event))

    def _part(self, text: str) -> dict[str, object]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, status: str, text: str) -> dict[str, object]:
        head: dict[str, object] = {"id": self._item_id, "status": status}
        if self._request.tool:
            call_id = f"call_{self._id}"
            return {**head, "type": "function_call", "call_id": call_id, "name": self._request.tool, "arguments": text}
        content = [] if status == "in_progress" else [self._part(text)]
        return {**head, "type": "message", "role": "assistant", "content": content}

    def _response(self, done: bool) -> dict[str, object]:
        request, output = self._request, len(self._request.pieces)
        cut = request.finish_reason == "length"
        status = ("incomplete" if cut else "completed") if done else "in_progress"
        usage = {
            "input_tokens": request.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": request.prompt_tokens + output,
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
            "model": request.model,
            "output": [self._item(status, request.text)] if done else [],
            "parallel_tool_calls": False,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": usage if done else None,
        }

    def _position(self) -> dict[str, object]:
        position: dict[str, object] = {"item_id": self._item_id, "output_index": 0}
        return position if self._request.tool else {**position, "content_index": 0}

    def whole(self) -> bytes:
        """The body of a response that is not streamed."""
        return _json(self._response(done=True))

    def first(self) -> bytes:
        """The response and its one item, both empty."""
        begun = (
            self._event("response.created", response=self._response(done=False))
            + self._event("response.in_progress", response=self._response(done=False))
            + self._event("response.output_item.added", output_index=0, item=self._item("in_progress", ""))
        )
        if self._request.tool:
            return begun
        return begun + self._event("response.content_part.added", **self._position(), part=self._part(""))

    def event(self, piece: str) -> bytes:
        """One token."""
        extra: dict[str, object] = {} if self._request.tool else {"logprobs": []}
        return self._event(f"{self._stream}.delta", **self._position(), delta=piece, **extra)

    def last(self) -> bytes:
        """The complete item and response."""
        text, position = self._request.text, self._position()
        status = "incomplete" if self._request.finish_reason == "length" else "completed"
        if self._request.tool:
            end = self._event(f"{self._stream}.done", **position, name=self._request.tool, arguments=text)
        else:
            end = self._event(f"{self._stream}.done", **position, text=text, logprobs=[])
            end += self._event("response.content_part.done", **position, part=self._part(text))
        end += self._event("response.output_item.done", output_index=0, item=self._item(status, text))
        return end + self._event(f"response.{status}", response=self._response(done=True))


def embeddings_body(request: EmbeddingRequest, seed: int) -> bytes:
    """The response body of `/v1/embeddings`."""
    data = []
    for index, text in enumerate(request.inputs):
        vector: object = TextGenerator(seed, text).vector(request.dimensions)
        if request.base64:
            packed = struct.pack(f"<{request.dimensions}f", *TextGenerator(seed, text).vector(request.dimensions))
            vector = base64.b64encode(packed).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": request.prompt_tokens, "total_tokens": request.prompt_tokens}
    return _json({"object": "list", "data": data, "model": request.model, "usage": usage})
