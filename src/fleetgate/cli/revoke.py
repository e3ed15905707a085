"""`fleetgate keys revoke`: revokes a key on this machine while the API cannot be reached."""

import getpass
import sys
import time
from pathlib import Path

import msgspec

from fleetgate.cli.client import CommandFailed
from fleetgate.core.model import Key, decode_snapshot
from fleetgate.ipc.revocation_list import REVOKED, Revocation, revoke
from fleetgate.ipc.signed_file import LAST_GOOD, SNAPSHOT, SignatureInvalid, public_key, verified


def revoke_here(data_dir: Path, name: str) -> None:
    """Add the key to this machine's revocation list. Raises: `CommandFailed`."""
    signing_key = _signing_key(data_dir / "signing.key")
    key = _find(data_dir, name, public_key(signing_key))
    try:
        revoke(data_dir / REVOKED, signing_key, Revocation(key.id, key.name, _user(), time.time()))
    except SignatureInvalid as error:
        raise CommandFailed(
            [f"{data_dir / REVOKED} is damaged ({error}); remove it, then revoke again every key that was on it"]
        ) from None
    except OSError as error:
        reason = f"{data_dir / REVOKED} cannot be written ({error.strerror})"
        raise CommandFailed([f"{reason}; free space there, or run this as the user of `fleetgate up`"]) from None
    sys.stdout.write(f"key {key.name} is revoked on this machine; the control process will copy this to the store\n")


def _signing_key(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        public_key(data)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        message = f"{path} cannot be read ({reason}); run this as the user of `fleetgate up`, with its --data-dir"
        raise CommandFailed([message]) from None
    return data


def _find(data_dir: Path, name: str, public: bytes) -> Key:
    """Find the key in the Snapshot that the workers use."""
    for file in (SNAPSHOT, LAST_GOOD):
        try:
            snapshot = decode_snapshot(verified((data_dir / file).read_bytes(), public))
        except (OSError, SignatureInvalid, msgspec.MsgspecError):
            continue
        for key in snapshot.keys:
            if name in (key.name, key.id):
                return key
        names = ", ".join(key.name for key in snapshot.keys[:20]) or "none"
        raise CommandFailed([f"there is no key {name[:80]!r} in this machine's Snapshot; its keys are: {names}"])
    raise CommandFailed([f"there is no valid Snapshot in {data_dir}; give the --data-dir of `fleetgate up`"])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "an operator"
