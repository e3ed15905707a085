"""The CLI's way to the API: where it is, who is asking, and every failure as one sentence."""

import os
from collections.abc import Iterator
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
ANSWER_S_MAX = 60.0  # a large fleet whose names resolve slowly


class CommandFailed(Exception):
    """A command could not be done. Shape: `messages` are sentences, one a line."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class UsageMistake(Exception):
    """One thing the API refused. Shape: `document` counts from 0."""

    def __init__(self, document: int, sentence: str) -> None:
        super().__init__(sentence)
        self.document = document
        self.sentence = sentence


class ApiRejected(CommandFailed):
    """The API listed mistakes in what was sent."""

    def __init__(self, message: str, mistakes: list[UsageMistake]) -> None:
        super().__init__([mistake.sentence for mistake in mistakes] or [message])
        self.mistakes = mistakes


class NeedsConfirmation(CommandFailed):
    """The API asks first, because much is taken away."""


class Client:
    """One session with the API."""

    def __init__(self, base_url: str, token: str) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx2.Client(
            headers={"authorization": f"Bearer {token}", "user-agent": "fleetgate-cli"},
            timeout=ANSWER_S_MAX,
            trust_env=False,  # the API is on this machine or a private network; a proxy would see the token
        )

    def get(self, path: str, **params: str | int) -> Any:
        """Read. Raises: `CommandFailed`."""
        return self._ask("GET", path, params=params)

    def post(self, path: str, body: Any) -> Any:
        """Create or apply. Raises: `CommandFailed`, `ApiRejected` where the API lists mistakes, `NeedsConfirmation`."""
        return self._ask("POST", path, body=body)

    def delete(self, path: str, **params: str | int) -> Any:
        """Delete. Raises: `CommandFailed`, `NeedsConfirmation`."""
        return self._ask("DELETE", path, params=params)

    def close(self) -> None:
        """End the session."""
        self._http.close()

    def _ask(self, method: str, path: str, body: Any = None, params: dict[str, str | int] | None = None) -> Any:
        for name, value in body.items() if isinstance(body, dict) else ():
            if isinstance(value, float) and not isfinite(value):
                raise CommandFailed([f"{name}: {value} cannot be sent; give a number"])
        try:
            answer = self._http.request(method, f"{self.base_url}{path}", json=body, params=params)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise CommandFailed([f"--api {self.base_url} is not a URL; write it like {DEFAULT_API}"]) from error
        except httpx2.TimeoutException as error:
            raise CommandFailed(
                [f"the API at {self.base_url} did not answer in {ANSWER_S_MAX:.0f} s; try again"]
            ) from error
        except httpx2.TransportError as error:
            raise CommandFailed(
                [f"no API answers at {self.base_url} ({error}); start it with `fleetgate up` or give --api"]
            ) from error
        if answer.is_success:
            return _value(answer, self.base_url)
        raise _failure(answer, self.base_url)


@contextmanager
def connected(api: str | None, token: str | None, data_dir: Path | None) -> Iterator[Client]:
    """A session: flags go first, then the files of a data directory that was given, the environment, the defaults.

    Raises: `CommandFailed`.
    """
    if data_dir is not None:
        api = api or _first_line(data_dir / "api-address", required=False)
        token = token or _first_line(data_dir / "owner-token", required=True)
    api = api or os.environ.get(API_ENV, "")
    token = token or os.environ.get(TOKEN_ENV, "")
    base_url = api or _first_line(DEFAULT_DATA_DIR / "api-address", required=False) or DEFAULT_API
    if not token and _is_this_machine(base_url):  # this machine's token is nobody else's business
        token = _first_line(DEFAULT_DATA_DIR / "owner-token", required=False)
    if not token:
        raise CommandFailed(
            [
                "there is no owner token: give --data-dir of the `fleetgate up` on this machine, --token, or set "
                "FLEETGATE_TOKEN"
            ]
        )
    if not token.isascii() or not token.isprintable():
        raise CommandFailed(
            ["the owner token has characters that a token cannot have; copy DATA_DIR/owner-token again"]
        )
    client = Client(base_url, token)
    try:
        yield client
    finally:
        client.close()


def resource_path(plural: str, name: str = "") -> str:
    """The API's path of a resource or of a list."""
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


def _value(answer: httpx2.Response, base_url: str) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise CommandFailed([f"{base_url} does not answer like a Fleetgate API; check --api"]) from error


def _failure(answer: httpx2.Response, base_url: str) -> CommandFailed:
    if answer.status_code == 401:
        return CommandFailed(
            [f"the API at {base_url} does not take this owner token; give the right --data-dir, or --token"]
        )
    match _value(answer, base_url):
        case {"error": {"message": str(message), "needs_confirmation": True}}:
            return NeedsConfirmation([message])
        case {"error": {"message": str(message), "errors": list(errors)}}:
            mistakes = [
                UsageMistake(
                    error.get("document", 0), f"{error['path']}: {error['message']}; {error['fix']}".lstrip(": ")
                )
                for error in errors
            ]
            if answer.status_code == 422:
                return ApiRejected(message, mistakes)
            return CommandFailed([message])
        case _:
            return CommandFailed([f"{base_url} answered {answer.status_code}; check --api"])
