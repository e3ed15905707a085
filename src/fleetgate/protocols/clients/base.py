"""The contract of a client protocol: what the proxy asks of it, and nothing else.

A protocol is one file in this folder: a module with constants and functions of these names. Calls go straight to
the module's functions, so the seam costs no Python call per request or per event. An object with the same members
serves as well, for a protocol that depends on a Gateway's settings.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from fleetgate.protocols.messages import EventMeaning, Operation, RequestInfo, ResumeMethod, Usage
from fleetgate.protocols.resume.splice import StreamSplicer
from fleetgate.protocols.resume.transcript import Transcript

Headers = Mapping[bytes, bytes]  # names in lower case


class ClientProtocol(Protocol):
    """One language that clients speak. All functions are pure."""

    TITLE: str  # as error messages name it: "OpenAI API"
    OPERATIONS: Mapping[bytes, Operation]  # by the path that the client asks for
    MODELS_PATH: bytes  # the list of models; `MODELS_PATH/NAME` is one of them; empty if there is no such list
    USAGE_ENGINES: frozenset[str]  # engines that report usage in a stream if `rewrite` asks for it
    PROMPT_MARKS: Sequence[bytes]  # the keys before the prompt in a body; the first that occurs counts
    EVENT_BEGINS: tuple[bytes, ...]  # how a content event of compact JSON may begin, up to its first brace
    ERROR_TYPE: bytes  # the content type of `error_body`
    CREDENTIAL_HINT: str  # how a client sends its key: "Authorization: Bearer <key>"

    # --- heads ---

    def methods_of(self, path: bytes) -> bytes:
        """The methods of a path as an `Allow` header lists them; empty for an unknown path."""

    def authorization_of(self, headers: Headers) -> bytes:
        """The client's credential in the form `Bearer KEY`; empty if it sent none."""

    def credential_lines(self, credential: str) -> bytes:
        """The header lines that carry an Endpoint's credential; empty for an Endpoint without one."""

    def request_headers(self, headers: Headers) -> bytes:
        """The header lines of a request that the Endpoint gets too: never the client's credential or cookies."""

    def response_headers(self, headers: Headers) -> bytes:
        """The header lines of a response that the client gets too. Source: faults.md row 27."""

    # --- requests ---

    def parse_request(self, body: bytes) -> RequestInfo:
        """Read and check a request body.

        Raises: `InvalidBody`, for every body that `rewrite` could not handle too.
        """

    def rewrite(self, body: bytes, info: RequestInfo, upstream_name: str, add_usage: bool) -> bytes:
        """The body for one engine: its own name for the model, usage if asked for, all other bytes unchanged."""

    def output_tokens_max(self, body: bytes) -> int:
        """The largest response that the request allows, 0 for no limit. Shape: `parse_request` accepted the body."""

    # --- responses and events ---

    def classify_event(self, event: bytes) -> tuple[EventMeaning, Usage | None]:
        """What one whole event means, and the usage in it, which replaces that of earlier events. Never raises."""

    def read_answer(self, body: bytes) -> tuple[Usage | None, bool]:
        """The usage of a whole response that is not a stream, and whether it is an error despite its status.

        Raises: `Malformed` for a body that is truncated or not of this protocol.
        """

    def status_of_error(self, data: bytes) -> int:
        """The status that the error in a body or event stands for if the response's own status was 200."""

    def note_choices(self, event: bytes, choices: dict[int, bool]) -> None:
        """Record in `choices` which choices have begun (their index) and ended (True)."""

    def rename_model(self, data: bytes, upstream_name: bytes, asked_name: bytes) -> bytes:
        """Replace the engine's model name with the one that the client asked for. Shape: names are JSON strings."""

    def other_model_name(self, data: bytes, asked_name: bytes) -> bytes | None:
        """The model name in a body or event if it is not the asked one. Shape: names are JSON strings."""

    # --- responses of the gateway itself ---

    def error_body(self, status: int, code: str, message: str, param: str | None = None) -> bytes:
        """An error as a whole body."""

    def error_event(self, code: str, message: str) -> bytes:
        """An error inside a stream."""

    def event_of_body(self, body: bytes) -> bytes:
        """A whole response, an error for example, as the last events of a stream that has begun."""

    def models_body(self, models: Mapping[str, str]) -> bytes:
        """The list of models. Shape: `models` maps a name to its owner."""

    def model_body(self, name: str, owner: str) -> bytes:
        """One model."""

    # --- resuming a stream that broke off ---

    def resume_methods(self, body: bytes, operation: Operation) -> frozenset[ResumeMethod]:
        """How the response to this request may continue elsewhere; empty if it cannot."""

    def new_transcript(self, operation: Operation, token_mark: int) -> Transcript:
        """An empty record of what a client receives."""

    def new_splicer(
        self, transcript: Transcript, method: ResumeMethod, model: str, operation: Operation
    ) -> StreamSplicer:
        """Joins a new response to the recorded one. Shape: `model` is the name that the client asked for."""

    def resume_body(self, method: ResumeMethod, body: bytes, transcript: Transcript, engine: str) -> bytes | None:
        """The request that makes an engine continue; None if an exact continuation is impossible."""

    def resume_path(self, method: ResumeMethod, path: bytes) -> bytes:
        """The path of that request. Shape: `path` is a key of `OPERATIONS`, as is the result."""


def missing_members(protocol: object) -> list[str]:
    """The constants and functions of the contract that a protocol does not define, in alphabetical order."""
    functions = [name for name, value in vars(ClientProtocol).items() if callable(value) and not name.startswith("_")]
    return sorted(name for name in (*ClientProtocol.__annotations__, *functions) if not hasattr(protocol, name))
