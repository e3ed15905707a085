"""Request bodies: read completely, up to a limit, and decoded as strict JSON."""

from typing import Any

import msgspec
from fastapi import Request

from fleetgate.control.api.errors import ApiError

BODY_BYTES_MAX = 16 * 1024 * 1024  # the CLI's own limit for a file
_decoder = msgspec.json.Decoder()


async def read_json(request: Request) -> Any:
    """The body's value.

    The content type is ignored: the token keeps requests of other sites out, and `curl -d` sends a wrong type.

    Raises: `ApiError` 413 or 400.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY_BYTES_MAX:
            raise ApiError(413, f"the body is larger than {BODY_BYTES_MAX} bytes; split it")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
        raise ApiError(400, f"the body is not JSON ({reason}); correct it") from error


async def read_document(request: Request, kind: str, name: str | None) -> dict[str, Any]:
    """A resource document. Its kind, and its name if the path has one, may be omitted.

    Raises: `ApiError`.
    """
    value = await read_json(request)
    match value:
        case dict():
            document: dict[str, Any] = value
        case _:
            raise ApiError(422, f"the body is not a mapping; send a {kind} document")
    if document.get("kind", kind) != kind:
        raise ApiError(422, f"`kind` of the body does not match the path; send kind {kind} or omit `kind`")
    if name is not None and document.get("name", name) != name:
        raise ApiError(422, f"`name` of the body does not match the path; send name {name!r} or omit `name`")
    if name is not None:
        document["name"] = name
    return {"kind": kind, **document}


def if_match(request: Request) -> int | None:
    """The generation in If-Match, or None without it. Raises: `ApiError` 400."""
    text = request.headers.get("if-match", "*").strip().removeprefix("W/").strip('"')
    if text == "*":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ApiError(400, 'If-Match is not a generation; send it like "3"')
    return int(text)
