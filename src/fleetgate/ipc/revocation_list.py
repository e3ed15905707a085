"""Keys revoked on one machine without its control plane: a signed list that its workers read.

It is for a leaked key while the control plane cannot be reached. When the control process is back, it copies the
revocations into the store and then removes them from the list (faults.md row 65).
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
    """A revoked key. Units: `at_s` since the epoch. Shape: `by` is the operator's user name."""

    id: str
    name: str
    by: str
    at_s: float


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[Revocation, ...]).decode


def read_revoked(path: Path, key: bytes) -> tuple[Revocation, ...]:
    """Read the list; it is empty if the file is missing.

    Shape: `key` is the public key.

    Raises: `SignatureInvalid` for a list that is damaged or signed with another key; `OSError`.
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
    """Add a key to the list. Raises: `SignatureInvalid` if the list on disk is not valid; `OSError`."""
    _change(path, signing_key, lambda listed: (*(other for other in listed if other.id != revocation.id), revocation))


def remove_revocation(path: Path, signing_key: bytes, ids: Collection[str]) -> None:
    """Remove keys that the store has by now. Raises: as `revoke`."""
    _change(path, signing_key, lambda listed: tuple(revocation for revocation in listed if revocation.id not in ids))


def _change(path: Path, signing_key: bytes, change: Callable[[tuple[Revocation, ...]], tuple[Revocation, ...]]) -> None:
    """Replace the file at once; a lock separates the command from the control process."""
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
