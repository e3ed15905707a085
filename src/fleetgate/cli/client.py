"""The CLI's HTTP client: finds the API and the owner token, and makes one sentence of every failure."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

DEFAULT_DATA_DIR = Path.home() / ".fleetgate"
DEFAULT_API = "http://127.0.0.1:7801"
API_ENV = "FLEETGATE_API"
TOKEN_ENV = "FLEETGATE_TOKEN"  # noqa: S105 - a name
RESPONSE_S_MAX = 60.0  # a large fleet with slow name servers
NO_FLAGS: Mapping[str, str] = {}


class CommandFailed(Exception):
    """A command failed. Shape: `messages` are sentences, one for each line of output."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class UsageMistake(Exception):
    """One mistake that the API found. Shape: `document` counts from 0."""

    def __init__(self, document: int, sentence: str) -> None:
        super().__init__(sentence)
        self.document = document
        self.sentence = sentence


class ApiRejected(CommandFailed):
    """The API refused a request and listed the mistakes in it."""

    def __init__(self, message: str, mistakes: list[UsageMistake]) -> None:
        super().__init__([mistake.sentence for mistake in mistakes] or [message])
        self.mistakes = mistakes


class NeedsConfirmation(CommandFailed):
    """The API needs a confirmation, because the change removes much of the fleet."""


class Client:
    """One session with the API."""

    def __init__(self, base_url: str, token: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx2.Client(
            headers={"authorization": f"Bearer {token}", "user-agent": "fleetgate-cli"},
            timeout=RESPONSE_S_MAX,
            trust_env=False,  # the API is on this machine or a private network; a proxy would see the token
        )

    def get(self, path: str, **params: str | int) -> Any:
        """GET a path. Raises: `CommandFailed`."""
        return self._send("GET", path, params=params)

    def post(self, path: str, body: Any, flags: Mapping[str, str] = NO_FLAGS) -> Any:
        """POST a body.

        Shape: `flags` maps fields of the body to the flags of the command; errors then name the flags.

        Raises: `CommandFailed`; of these, `ApiRejected` with the mistakes in the body, and `NeedsConfirmation`.
        """
        for name, value in body.items() if isinstance(body, dict) else ():
            if isinstance(value, float) and not isfinite(value):
                raise CommandFailed([f"{flags.get(name, name)}: {value} is not a finite number; give a number"])
        return self._send("POST", path, body=body, flags=flags)

    def delete(self, path: str, **params: str | int) -> Any:
        """DELETE a path. Raises: `CommandFailed`; of these, `NeedsConfirmation`."""
        return self._send("DELETE", path, params=params)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: dict[str, str | int] | None = None,
        flags: Mapping[str, str] = NO_FLAGS,
    ) -> Any:
        try:
            response = self._http.request(method, f"{self.base_url}{path}", json=body, params=params)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise CommandFailed([f"--api {self.base_url} is not a URL; write it like {DEFAULT_API}"]) from error
        except httpx2.TimeoutException as error:
            raise CommandFailed(
                [f"the API at {self.base_url} did not answer within {RESPONSE_S_MAX:.0f} s; try again"]
            ) from error
        except httpx2.TransportError as error:
            raise CommandFailed(
                [f"the API at {self.base_url} cannot be reached ({error}); start it with `fleetgate up` or give --api"]
            ) from error
        if response.is_success:
            return _json_body(response, self.base_url)
        raise _failure(response, self.base_url, flags)


@contextmanager
def connected(api: str | None, token: str | None, data_dir: Path | None) -> Iterator[Client]:
    """Yield a client.

    URL and token come from the first of: the flags, the files in `data_dir`, the environment, the default data
    directory.

    Raises: `CommandFailed`.
    """
    if data_dir is not None:
        api = api or _first_line(data_dir / "api-address", required=False)
        token = token or _first_line(data_dir / "owner-token", required=True)
    api = api or os.environ.get(API_ENV, "")
    token = token or os.environ.get(TOKEN_ENV, "")
    base_url = api or _first_line(DEFAULT_DATA_DIR / "api-address", required=False) or DEFAULT_API
    if not token and _is_this_machine(base_url):  # never send this machine's token to another one
        token = _first_line(DEFAULT_DATA_DIR / "owner-token", required=False)
    if not token:
        raise CommandFailed(
            [
                "there is no owner token: give the --data-dir of `fleetgate up` on this machine, give --token, or set "
                "FLEETGATE_TOKEN"
            ]
        )
    if not token.isascii() or not token.isprintable():
        raise CommandFailed(["the owner token has invalid characters; copy it again from DATA_DIR/owner-token"])
    client = Client(base_url, token)
    try:
        yield client
    finally:
        client.close()


def resource_path(plural: str, name: str = "") -> str:
    """Return the API path of a resource, or of the list of its kind."""
    return f"/api/v1/{plural}/{quote(name, safe='')}" if name else f"/api/v1/{plural}"


def _is_this_machine(base_url: str) -> bool:
    try:
        return urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
    except ValueError:
        return False


def _first_line(path: Path, required: bool) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError as error:
        if not required:
            return ""
        reason = (error.strerror or "no reason given").lower()
        raise CommandFailed(
            [f"{path} cannot be read ({reason}); give the --data-dir that `fleetgate up` uses, or --token"]
        ) from error


def _json_body(response: httpx2.Response, base_url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise CommandFailed([f"{base_url} did not answer with JSON, as the Fleetgate API does; check --api"]) from error


def _failure(response: httpx2.Response, base_url: str, flags: Mapping[str, str]) -> CommandFailed:
    if response.status_code == 401:
        return CommandFailed([f"the API at {base_url} refused this owner token; give the right --data-dir or --token"])
    match _json_body(response, base_url):
        case {"error": {"message": str(message), "needs_confirmation": True}}:
            return NeedsConfirmation([message])
        case {"error": {"message": str(message), "errors": list(errors)}}:
            mistakes = [UsageMistake(error.get("document", 0), _mistake_sentence(error, flags)) for error in errors]
            if response.status_code == 422:
                return ApiRejected(message, mistakes)
            return CommandFailed([message])
        case _:
            return CommandFailed([f"{base_url} answered {response.status_code}; check --api"])


def _mistake_sentence(error: Mapping[str, str], flags: Mapping[str, str]) -> str:
    field = flags.get(error["path"].removeprefix("body."), error["path"])
    return f"{field}: {error['message']}; {error['fix']}".lstrip(": ")
