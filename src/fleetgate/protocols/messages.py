"""Values that every client protocol shares: an operation, a parsed request, the meaning of an event, token usage."""

from enum import Enum, StrEnum

import msgspec


class BodyForm(Enum):
    """How a request body reaches the protocol."""

    JSON = "json"  # buffered whole, then parsed by `parse_request`


class Operation(msgspec.Struct, frozen=True):
    """One path of a protocol.

    Shape: `path` follows the Endpoint's base URL. `fast_mark` occurs in every content event of compact JSON and in no
    event of another meaning, so that one `find` classifies it; a mark that no event contains turns this off.
    `done_mark` is the event that follows the last one of a stream, empty if the protocol has none. `usage_option`
    tells that a stream reports usage only if the request asks for it.
    """

    name: str
    path: bytes
    fast_mark: bytes
    done_mark: bytes = b""
    usage_option: bool = False
    streams: bool = True
    body: BodyForm = BodyForm.JSON


class RequestInfo(msgspec.Struct, frozen=True):
    """What routing needs of a request body.

    Shape: `plain` tells that the only `"model"` in the body is the top-level key; `several` tells that the response may
    have more than one choice.
    """

    model: str
    stream: bool
    wants_usage: bool
    has_stream_options: bool
    plain: bool
    several: bool = False


class EventMeaning(Enum):
    """What an event of a stream means to a relay."""

    CONTENT = "content"
    OTHER = "other"  # well formed, neither content nor an end: a role, a lifecycle event
    FINISH = "finish"  # ends a choice, or the whole response
    USAGE = "usage"  # carries nothing but usage
    DONE = "done"
    COMMENT = "comment"
    ERROR = "error"
    MALFORMED = "malformed"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one response, under the names of OpenAI's older and newer APIs."""

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


class ResumeMethod(StrEnum):
    """How a stream that broke off continues at another Endpoint."""

    REPLAY = "replay"  # send the same request; pass on what follows the text that the client has
    PREFILL = "prefill"  # ask the engine to continue the text that the client has
    TOKENS = "tokens"  # give the engine the token ids of prompt and output
