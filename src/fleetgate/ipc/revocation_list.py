"""Keys revoked on one machine without its control plane: a signed list that workers read for themselves.

The way out for when a key has leaked and the control plane cannot be reached. The control process takes what is listed
into the store as soon as it is back, and only then off the list. FAULTS.md row 65.
"""

import fcntl
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from fleetgate.ipc.signed_file import SignatureInvalid, public_key, sign, verified

REVOKED = "revoked"
FORM = b"fleetgate-revoked 1 "


class Revocation(msgspec.Struct, frozen=True):
    """One key that is good for nothing any more. Units: `at_s` since the epoch."""

    id: str
    name: str
    by: str
    at_s: float


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[Revocation, ...]).decode


def read_revoked(path: Path, key: bytes) -> tuple[Revocation, ...]:
    """What is listed. Shape: `key` is the public one.

    Raises: `SignatureInvalid` for a list that is damaged or somebody else's, `OSError`.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        return _decode(verified(data, key, FORM))
    except msgspec.MsgspecError as error:
        raise SignatureInvalid(str(error)) from None


def revoke(path: Path, signing_key: bytes, revocation: Revocation) -> None:
    """Put a key on the list. Raises: `OSError`; `SignatureInvalid` where the list that is there cannot be trusted."""
    _change(path, signing_key, lambda listed: (*(one for one in listed if one.id != revocation.id), revocation))


def remove_revocation(path: Path, signing_key: bytes, ids: Collection[str]) -> None:
    """Take keys off the list that the store knows of now. Raises: as `revoke`."""
    _change(path, signing_key, lambda listed: tuple(one for one in listed if one.id not in ids))


def _change(path: Path, signing_key: bytes, change: Callable[[tuple[Revocation, ...]], tuple[Revocation, ...]]) -> None:
    """Replace the list whole; a lock keeps the command and the control process apart."""
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        after = change(read_revoked(path, public_key(signing_key)))
        if not after:
            path.unlink(missing_ok=True)
            return
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(sign(_encode(after), signing_key, FORM))
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.close(lock)
