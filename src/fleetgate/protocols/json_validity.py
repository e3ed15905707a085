"""What one look at bytes tells of them, before they are passed on."""

import msgspec

_skim = msgspec.json.Decoder(msgspec.Raw).decode


def is_plain(event: bytes) -> bool:
    """Whether its first line is all of it, and JSON: a line end, which JSON allows, would end the data too."""
    return event.find(b"\n") == len(event) - 2 and event.find(b"\r") < 0 and is_json(event[6:-2])


def is_json(data: bytes) -> bool:
    """Whether something is JSON, without making anything of it."""
    try:
        _skim(data)
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


def is_text(data: bytes) -> bool:
    """Whether it is UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def as_text(event: bytes) -> bytes:
    """The event with what is not UTF-8 replaced: the official SDKs die of such bytes. FAULTS.md row 26."""
    return event if event.isascii() or is_text(event) else event.decode(errors="replace").encode()
