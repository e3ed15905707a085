"""Parsers for the request bodies of a simulated engine, one per operation."""

import zlib
from typing import Any

import msgspec

from fleetgate.engine.json_schema import Schema, generate_value
from fleetgate.engine.text_generator import TextGenerator, json_pieces

BYTES_PER_TOKEN = 4
OUTPUT_TOKENS_MAX = 32_768
DIMENSIONS_MAX = 4096
DIMENSIONS = 64
INPUTS_MAX = 2048


class InvalidRequest(Exception):
    """The request body is invalid; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: msgspec.Raw = msgspec.Raw(b"null")
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class _Function(msgspec.Struct, frozen=True):
    name: str
    parameters: Schema = Schema()


class _Tool(msgspec.Struct, frozen=True):
    """A tool of chat completions (`function`) or of responses (`name` and `parameters` directly)."""

    type: str = "function"
    function: _Function | None = None
    name: str = ""
    parameters: Schema | None = None

    def flat(self) -> _Function:
        return self.function or _Function(self.name, self.parameters or Schema())


class _Choice(msgspec.Struct, frozen=True):
    type: str = "function"
    function: _Function | None = None
    name: str = ""


class _JsonSchema(msgspec.Struct, frozen=True):
    schema: Schema = Schema(type="object")


class _Format(msgspec.Struct, frozen=True):
    """A `response_format` of chat completions or the `text.format` of responses."""

    type: str = "text"
    json_schema: _JsonSchema | None = None
    schema: Schema | None = None


class _Text(msgspec.Struct, frozen=True):
    format: _Format = _Format()


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _Body(msgspec.Struct, frozen=True):
    model: str
    stream: bool | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | _Choice | None = None


class _Sampled(_Body, frozen=True):
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None


class _Chat(_Sampled, frozen=True):
    messages: list[_Message] = []
    max_completion_tokens: int | None = None
    response_format: _Format | None = None


class _Completion(_Sampled, frozen=True):
    prompt: msgspec.Raw = msgspec.Raw(b"")
    response_format: _Format | None = None


class _Response(_Body, frozen=True):
    input: msgspec.Raw = msgspec.Raw(b'""')
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: _Text | None = None


class _Embedding(msgspec.Struct, frozen=True):
    model: str
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """A request for generated tokens. Shape: `pieces` are the tokens of the response, cut to the client's limit."""

    model: str
    stream: bool
    include_usage: bool
    prompt_tokens: int
    pieces: list[str]
    finish_reason: str
    tool: str = ""

    @property
    def text(self) -> str:
        """The whole text of the response."""
        return "".join(self.pieces)


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """A request for embeddings."""

    model: str
    inputs: list[bytes]
    base64: bool
    dimensions: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(tokens_of(text) for text in self.inputs)


class OutputDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The output of an engine if a request sets no limit."""

    seed: int = 0
    output_tokens: int = 64


def tokens_of(text: bytes) -> int:
    """Tokens of a text, estimated from its bytes."""
    return max(1, -(-len(text) // BYTES_PER_TOKEN))


_read_chat = msgspec.json.Decoder(_Chat).decode
_read_completion = msgspec.json.Decoder(_Completion).decode
_read_response = msgspec.json.Decoder(_Response).decode
_read_embedding = msgspec.json.Decoder(_Embedding).decode


def read_chat(body: bytes, defaults: OutputDefaults) -> GenerationRequest:
    """Parse the body of a chat completion. Raises: `InvalidRequest`."""
    chat: _Chat = _read(_read_chat, body)
    if not chat.messages:
        raise InvalidRequest("`messages` is empty; give at least one message", "messages")
    prompt = b"\n".join(b"%b:%b%b" % (m.role.encode(), bytes(m.content), bytes(m.tool_calls)) for m in chat.messages)
    limit = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
    tool_answered = chat.messages[-1].role == "tool"
    return _generation_request(
        chat,
        prompt,
        _OutputOptions(_limit(limit), _tokens_min(chat, limit), chat.response_format, tool_answered),
        defaults,
    )


def read_completion(body: bytes, defaults: OutputDefaults) -> GenerationRequest:
    """Parse the body of a legacy completion. Raises: `InvalidRequest`."""
    completion: _Completion = _read(_read_completion, body)
    if not bytes(completion.prompt):
        raise InvalidRequest("`prompt` is missing; give a text", "prompt")
    options = _OutputOptions(
        _limit(completion.max_tokens), _tokens_min(completion, completion.max_tokens), completion.response_format, False
    )
    return _generation_request(completion, bytes(completion.prompt), options, defaults)


def read_response(body: bytes, defaults: OutputDefaults) -> GenerationRequest:
    """Parse the body of the responses API. Raises: `InvalidRequest`."""
    response: _Response = _read(_read_response, body)
    prompt = (response.instructions or "").encode() + bytes(response.input)
    tool_answered = b'"function_call_output"' in prompt
    output_format = response.text.format if response.text else None
    return _generation_request(
        response, prompt, _OutputOptions(_limit(response.max_output_tokens), 0, output_format, tool_answered), defaults
    )


def read_embedding(body: bytes) -> EmbeddingRequest:
    """Parse the body of an embedding. Raises: `InvalidRequest`."""
    request: _Embedding = _read(_read_embedding, body)
    given = request.input
    one = isinstance(given, str) or not given or isinstance(given[0], int)  # a text or one list of token ids
    inputs: list[Any] = [given] if one else list(given)
    dimensions = request.dimensions if request.dimensions is not None else DIMENSIONS
    if not given or len(inputs) > INPUTS_MAX:
        raise InvalidRequest(f"`input` must hold 1 to {INPUTS_MAX} texts", "input")
    if not 1 <= dimensions <= DIMENSIONS_MAX:
        raise InvalidRequest(f"`dimensions` must be 1 to {DIMENSIONS_MAX}", "dimensions")
    texts = [text.encode() if isinstance(text, str) else repr(text).encode() for text in inputs]
    return EmbeddingRequest(
        model=request.model, inputs=texts, base64=request.encoding_format == "base64", dimensions=dimensions
    )


class _OutputOptions(msgspec.Struct, frozen=True):
    """The output limits and format of a request. Shape: `tool_answered` if the last message is the result of a tool."""

    limit: int | None
    tokens_min: int
    output_format: _Format | None
    tool_answered: bool


def _read(decode: Any, body: bytes) -> Any:
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None


def _limit(tokens: int | None) -> int | None:
    if tokens is not None and tokens < 1:
        raise InvalidRequest("`max_tokens` must be at least 1", "max_tokens")
    return tokens


def _tokens_min(body: _Sampled, limit: int | None) -> int:
    """The minimum of output tokens; with `ignore_eos` it is the limit, if there is one."""
    return OUTPUT_TOKENS_MAX if body.ignore_eos and limit is not None else body.min_tokens or 0


def _generation_request(
    body: _Body, prompt: bytes, options: _OutputOptions, defaults: OutputDefaults
) -> GenerationRequest:
    stream_options = getattr(body, "stream_options", None)
    generator = TextGenerator(defaults.seed, prompt)
    tool = _tool(body, options.tool_answered)
    limit = min(options.limit if options.limit is not None else OUTPUT_TOKENS_MAX, OUTPUT_TOKENS_MAX)
    if tool is not None:
        pieces = json_pieces(_arguments(tool.parameters, generator))
    elif options.output_format is not None and options.output_format.type in ("json_object", "json_schema"):
        pieces = json_pieces(_structured(options.output_format, generator))
    else:
        pieces = generator.pieces(min(max(defaults.output_tokens, options.tokens_min), limit + 1))
    cut = len(pieces) > limit
    return GenerationRequest(
        model=body.model,
        stream=bool(body.stream),
        include_usage=bool(stream_options and stream_options.include_usage),
        prompt_tokens=tokens_of(prompt),
        pieces=pieces[:limit],
        finish_reason="length" if cut else "tool_calls" if tool is not None else "stop",
        tool=tool.name if tool is not None else "",
    )


def _tool(body: _Body, tool_answered: bool) -> _Function | None:
    """The tool that the response calls: one that `tool_choice` selects and that has no result yet."""
    if not body.tools or body.tool_choice in (None, "none") or (tool_answered and body.tool_choice == "auto"):
        return None
    tools = [tool.flat() for tool in body.tools if tool.type == "function"]
    name = ""
    if isinstance(body.tool_choice, _Choice):
        name = body.tool_choice.function.name if body.tool_choice.function else body.tool_choice.name
    chosen = [tool for tool in tools if not name or tool.name == name]
    if not chosen:
        raise InvalidRequest(f"`tool_choice` names {name!r}, which is not among `tools`", "tool_choice")
    return chosen[0]


def _arguments(parameters: Schema, generator: TextGenerator) -> object:
    return generate_value(parameters, generator) if parameters.properties else {}


def _structured(output_format: _Format, generator: TextGenerator) -> object:
    schema = output_format.schema or (output_format.json_schema.schema if output_format.json_schema else None)
    if output_format.type == "json_schema" and schema is not None:
        return generate_value(schema, generator)
    return {"answer": " ".join(generator.word(index) for index in range(8))}


def response_id(prefix: str, number: int, body: bytes) -> str:
    """An id that is the same in every run with the same requests."""
    return f"{prefix}-{zlib.crc32(body):08x}{number:08x}"
