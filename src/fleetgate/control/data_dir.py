"""The data directory and its secrets, which are created once. Each error names the path and the fix."""

import os
import secrets
from pathlib import Path

import msgspec

from fleetgate.ipc.revocation_list import REVOKED
from fleetgate.ipc.signed_file import LAST_GOOD, PUBLIC_KEY, SNAPSHOT, public_key

SECRET_BYTES = 32
OWNER_TOKEN = "owner-token"  # noqa: S105 - a file's name
API_ADDRESS = "api-address"
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600


class DataDirUnusable(Exception):
    """The data directory or a file in it cannot be used; the text names the path and the fix."""


class DataDir(msgspec.Struct, frozen=True):
    """The paths and secrets of a data directory."""

    path: Path
    owner_token: str
    pepper: bytes
    seal_key: bytes
    signing_key: bytes

    @property
    def database(self) -> Path:
        """The store's file."""
        return self.path / "fleetgate.db"

    @property
    def snapshot(self) -> Path:
        """The Snapshot file, which workers read."""
        return self.path / SNAPSHOT

    @property
    def revoked(self) -> Path:
        """The list of keys that were revoked on this machine while the control plane was not reachable."""
        return self.path / REVOKED

    @property
    def last_good_snapshot(self) -> Path:
        """The workers' copy of the last Snapshot that served without failures."""
        return self.path / LAST_GOOD


def open_data_dir(path: Path) -> DataDir:
    """Create or open a data directory with its secrets.

    Raises: `DataDirUnusable`.
    """
    try:
        path.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
        # A directory of another owner keeps its mode; the modes of the secret files protect them.
        if path.stat().st_uid == os.getuid():
            path.chmod(_DIRECTORY_MODE)
        return DataDir(
            path=path,
            owner_token=_token(path / OWNER_TOKEN),
            pepper=_secret(path / "pepper"),
            seal_key=_secret(path / "seal.key"),
            signing_key=_signing_key(path),
        )
    except OSError as error:
        raise DataDirUnusable(unusable_sentence(path, error)) from error


def unusable_sentence(path: Path, error: OSError) -> str:
    """The sentence that says why the data directory cannot be used."""
    reason = error.strerror or str(error)
    return f"the data directory {path} cannot be used ({reason}); give a writable directory with --data-dir"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader, also after a crash, sees the old or the new content completely.

    Raises: `OSError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _FILE_MODE)
    try:
        os.fchmod(descriptor, _FILE_MODE)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _secret(path: Path) -> bytes:
    if not path.exists():
        write_whole(path, secrets.token_bytes(SECRET_BYTES))
    data = path.read_bytes()
    if len(data) != SECRET_BYTES:
        raise DataDirUnusable(
            f"{path} is damaged: it has {len(data)} bytes, not {SECRET_BYTES}; restore it from a backup"
        )
    return data


def _signing_key(path: Path) -> bytes:
    """The key that signs Snapshots. The public key is stored beside it; proxies read only the public key."""
    key = _secret(path / "signing.key")
    public = path / PUBLIC_KEY
    if not public.exists() or public.read_bytes() != public_key(key):
        write_whole(public, public_key(key))
    return key


def _token(path: Path) -> str:
    if not path.exists():
        write_whole(path, f"fgo_{secrets.token_urlsafe(SECRET_BYTES)}\n".encode())
    token = path.read_text("ascii", errors="replace").strip()
    if len(token) < SECRET_BYTES or not token.isascii():
        raise DataDirUnusable(f"{path} is damaged; remove it, and the next start writes a new owner token")
    return token
