"""Request bodies: read whole, within bounds, as strict JSON."""

from typing import Any

import msgspec
from fastapi import Request

from fleetgate.control.api.errors import ApiError

BODY_BYTES_MAX = 16 * 1024 * 1024  # the CLI's own bound for a file
_decoder = msgspec.json.Decoder()


async def read_json(request: Request) -> Any:
    """The body's value. Raises: `ApiError` 413 or 400.

    The content type is not asked: the token, not the type, keeps other sites out, and `curl -d` names a wrong one.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY_BYTES_MAX:
            raise ApiError(413, f"the body is over {BODY_BYTES_MAX} bytes; split it")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
        raise ApiError(400, f"the body is not JSON ({reason}); correct it") from error


async def read_document(request: Request, kind: str, name: str | None) -> dict[str, Any]:
    """A resource document whose kind, and name where the path has one, may be left out.

    Raises: `ApiError`.
    """
    value = await read_json(request)
    match value:
        case dict():
            document: dict[str, Any] = value
        case _:
            raise ApiError(422, f"the body is not a mapping; send a {kind} document")
    if document.get("kind", kind) != kind:
        raise ApiError(422, f"the body is of another kind than the path; send kind {kind} or leave `kind` out")
    if name is not None and document.get("name", name) != name:
        raise ApiError(422, f"the body has another name than the path; send name {name!r} or leave `name` out")
    if name is not None:
        document["name"] = name
    return {"kind": kind, **document}


def if_match(request: Request) -> int | None:
    """The generation in If-Match, None without one. Raises: `ApiError` 400."""
    text = request.headers.get("if-match", "*").strip().removeprefix("W/").strip('"')
    if text == "*":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ApiError(400, 'If-Match is not a generation; send it like "3"')
    return int(text)
