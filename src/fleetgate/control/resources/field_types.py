"""The types of single fields. Each refuses a wrong value with a sentence and a fix."""

import re
from datetime import UTC, datetime
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

import msgspec
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fleetgate.core.routing import strategies
from fleetgate.protocols import clients

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_REGION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*/?")
_URL_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_CONTROL_CHARS = re.compile(r"[\x00-\x1f\x7f]")
_AFTER = re.compile(r"([0-9]{1,6})(s|m|h|d|w)")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
MODEL_CHARS_MAX = 256
LABEL_CHARS_MAX = 256
HOST_CHARS_MAX = 253
SECRET_CHARS_MAX = 8192
DEFAULT_PORTS = {"http": 80, "https": 443}
_PLANNED_PROTOCOLS = ("anthropic", "http")


def refuse_field(message: str, fix: str) -> NoReturn:
    """Refuse the value of a field. Raises: `PydanticCustomError` always."""
    raise PydanticCustomError("fleetgate", "{message}; {fix}", {"message": message, "fix": fix})


class Url(msgspec.Struct, frozen=True):
    """A parsed base URL. Shape: `path` has no trailing slash, `host` is lower case and without brackets."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def _name(value: str) -> str:
    if not _LABEL.fullmatch(value):
        refuse_field(
            f"{value[:80]!r} is not a name",
            "use 1 to 63 of a-z, 0-9 and -, with a letter or digit at both ends",
        )
    return value


def _domain(value: str) -> str:
    lowered = value.lower()
    if len(lowered) > HOST_CHARS_MAX or not all(_LABEL.fullmatch(part) for part in lowered.split(".")):
        refuse_field(
            f"{value[:80]!r} is not a domain", "write it like example.com, without scheme, port or trailing dot"
        )
    return lowered


def _region(value: str) -> str:
    if not _REGION.fullmatch(value):
        refuse_field(f"{value[:80]!r} is not a region", "use letters, digits, -, _ and ., like us-east")
    return value


def _model(value: str) -> str:
    if not value or len(value) > MODEL_CHARS_MAX or _CONTROL_CHARS.search(value):
        refuse_field(
            "is not a model name", f"use 1 to {MODEL_CHARS_MAX} characters without line ends, like llama-3.3-70b"
        )
    return value


def _labels(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _LABEL_NAME.fullmatch(name):
            refuse_field(f"{name[:80]!r} is not a label name", "use letters, digits, -, _, . and /")
        if len(text) > LABEL_CHARS_MAX or _CONTROL_CHARS.search(text):
            refuse_field(f"the label {name} is too long or has line ends", f"use at most {LABEL_CHARS_MAX} characters")
    return value


def _env(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _ENV_NAME.fullmatch(name) or "\x00" in text:
            refuse_field(
                f"{name[:80]!r} is not an environment variable", "use letters, digits and _, and no NUL in the value"
            )
    return value


def _command(value: list[str]) -> list[str]:
    if any("\x00" in part for part in value):
        refuse_field("has a NUL character", "remove it")
    return value


def _path(value: str) -> str:
    if not value.startswith("/") or not _URL_PATH.fullmatch(value):
        refuse_field(f"{value[:80]!r} is not a path", "begin it with /, like /health, without ? and #")
    return value


def parse_url(value: str) -> Url:
    """Parse a base URL. Raises: `PydanticCustomError` with a sentence and a fix."""
    if _CONTROL_CHARS.search(value) or " " in value or not value.isascii():
        refuse_field("has characters that a URL cannot have", "write it like https://HOST:PORT/v1")
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return refuse_field(
            "has a bad port or bracket", "write it like https://HOST:8443/v1, with a port from 1 to 65535"
        )
    if parts.scheme not in DEFAULT_PORTS:
        refuse_field(f"has the scheme {parts.scheme[:20]!r}", "begin it with https:// or http://")
    if "@" in parts.netloc:
        refuse_field("has a user or password in it", "remove it and name a Secret in `credential`")
    if "?" in value or "#" in value:
        refuse_field("has a query or fragment", "remove everything from ? or # on")
    host = parts.hostname or ""
    if not _URL_HOST.fullmatch(host) or len(host) > HOST_CHARS_MAX:
        refuse_field("has no usable host", "write it like https://HOST:PORT/v1")
    if port == 0:
        refuse_field("has port 0", "use a port from 1 to 65535")
    if not _URL_PATH.fullmatch(parts.path) or {".", ".."} & set(parts.path.split("/")):
        refuse_field("has a path that cannot be used", "write it like https://HOST:PORT/v1")
    return Url(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"))


def _url(value: str) -> str:
    parse_url(value)
    return value


def expires_at_s(value: str, created_s: float) -> float:
    """The time at which a Key expires, given as `30d` after its creation or as an RFC 3339 time.

    Units: seconds since the epoch; 0 for never.
    """
    if not value or value == "never":
        return 0.0
    after = _AFTER.fullmatch(value)
    if after:
        return created_s + int(after[1]) * _UNIT_S[after[2]]
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _expires(value: str) -> str:
    try:
        expires_at_s(value, 0.0)
    except (ValueError, OverflowError):
        refuse_field(f"{value[:80]!r} is not a time", "write 30d, 12h or a time like 2030-01-31T12:00:00Z")
    return value


def _strategy(value: str) -> str:
    known = strategies.names()
    if value not in known:
        refuse_field(f"there is no strategy {value[:80]!r}", f"use one of: {', '.join(known)}")
    return value


def _protocol(value: str) -> str:
    known = clients.names()
    if value not in known:
        fix = f"use {' or '.join(known)}"
        if value in _PLANNED_PROTOCOLS:
            refuse_field(f"protocol {value} comes in a later release", fix)
        refuse_field(f"there is no protocol {value[:80]!r}", fix)
    return value


def restore_off(value: object) -> object:
    """Restore `off`, which YAML 1.1 reads as false."""
    return "off" if value is False else value


def _secret(value: str) -> str:
    if not value or len(value) > SECRET_CHARS_MAX or _CONTROL_CHARS.search(value) or not value.isascii():
        refuse_field(
            "the value cannot be sent in a header", "use visible ASCII characters on one line, without a line end"
        )
    return value


Name = Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{_LABEL.pattern}$"})]
Domain = Annotated[str, AfterValidator(_domain)]
Region = Annotated[str, AfterValidator(_region)]
ModelName = Annotated[str, AfterValidator(_model)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Environment = Annotated[dict[str, str], AfterValidator(_env)]
Command = Annotated[list[str], AfterValidator(_command)]
Path = Annotated[str, AfterValidator(_path)]
BaseUrl = Annotated[str, AfterValidator(_url)]
Expires = Annotated[str, AfterValidator(_expires)]
StrategyName = Annotated[str, AfterValidator(_strategy)]
Protocol = Annotated[str, AfterValidator(_protocol)]
SecretText = Annotated[str, AfterValidator(_secret)]
