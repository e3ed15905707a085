"""The Snapshot file, checked ten times a second and used whole or not at all, and the copy of the last good one."""

import os
from pathlib import Path

import msgspec

from fleetgate.core.model import SNAPSHOT_BYTES_MAX, Snapshot, decode_snapshot
from fleetgate.ipc.signed_file import LAST_GOOD, PUBLIC_KEY, SNAPSHOT, SignatureInvalid, verified

EMPTY = Snapshot(version=0, made_at_s=0.0)
GIVEN_UP = "snapshot.given-up"  # holds the version that was rolled back, for workers that start later


class SnapshotUnusable(Exception):
    """A Snapshot cannot be used; the text says why."""


class SnapshotFile:
    """Reads the Snapshots of the publisher. The last good one stays in use whatever happens to the file."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / SNAPSHOT
        self._copy = data_dir / LAST_GOOD
        self._given_up_path = data_dir / GIVEN_UP
        self._public_key_path = data_dir / PUBLIC_KEY
        # Read once: a later writer of the directory cannot replace the key that Snapshots are checked with.
        self._public_key = b""
        self._seen = (0, 0, 0)
        self._newest = 0
        self._copied = 0
        self.data = b""  # the newest Snapshot as it was signed
        self.refused = ""

    def changed(self) -> Snapshot | None:
        """The new Snapshot if the file was replaced by a good one since the last call, else None.

        Cost: one `stat`, 2 µs, when nothing changed.
        """
        try:
            stat = self._path.stat()
        except OSError:
            return None
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return None
        try:
            snapshot = self._take(stat.st_size)
        except OSError as error:
            self.refused = f"{self._path} cannot be read: {error.strerror}"  # the next call tries again
            return None
        except SnapshotUnusable as error:
            self.refused = f"{self._path} is refused: {error}"
            snapshot = None
        else:
            self.refused = ""
        self._seen = seen
        return snapshot

    def last_good(self) -> Snapshot | None:
        """The copy, None if it is not good. A worker starts from it if the file is not good."""
        try:
            snapshot = self._read(self._copy.read_bytes())
        except (OSError, SnapshotUnusable):
            return None
        self._copied = snapshot.version
        self._newest = max(self._newest, snapshot.version)
        return snapshot

    def keep(self, data: bytes, version: int) -> None:
        """Make this the last good copy. It waits for the disk: call it in a thread.

        Raises: `OSError`; the copy before then stays whole.
        """
        if version == self._copied:
            return
        temporary = self._copy.with_name(f".{self._copy.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(self._copy)
        self._copied = version

    def give_up(self, version: int) -> None:
        """Write down that this version was rolled back; 0 for none. Lost on a full disk, which costs another trial."""
        try:
            if version:
                self._given_up_path.write_text(f"{version}\n")
            else:
                self._given_up_path.unlink(missing_ok=True)
        except OSError:
            return

    def given_up(self) -> int:
        """The version that was rolled back, 0 if none was."""
        try:
            text = self._given_up_path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return 0
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0

    def _take(self, size_bytes: int) -> Snapshot | None:
        """The file's Snapshot; None if it is the same as before."""
        if size_bytes > SNAPSHOT_BYTES_MAX:
            raise SnapshotUnusable(f"it has {size_bytes} bytes, and {SNAPSHOT_BYTES_MAX} is the maximum")
        data = self._path.read_bytes()
        snapshot = self._read(data)
        if snapshot.version < self._newest:
            raise SnapshotUnusable(f"it is version {snapshot.version}, and version {self._newest} was seen before")
        if snapshot.version == self._newest and self.data:
            if data != self.data:
                raise SnapshotUnusable(f"it differs from the version {snapshot.version} that was seen before")
            return None
        self._newest, self.data = snapshot.version, data
        return snapshot

    def _read(self, data: bytes) -> Snapshot:
        if not self._public_key:
            try:
                self._public_key = self._public_key_path.read_bytes()
            except OSError as error:
                raise SnapshotUnusable(f"its public key {self._public_key_path} cannot be read: {error}") from None
        try:
            snapshot = decode_snapshot(verified(data, self._public_key))
        except (SignatureInvalid, msgspec.MsgspecError) as error:
            raise SnapshotUnusable(str(error)) from None
        except ValueError:
            raise SnapshotUnusable(f"its public key {self._public_key_path} is damaged") from None
        if snapshot.version < 1:
            raise SnapshotUnusable("its version is under 1")
        if not (snapshot.gateways or snapshot.emptied):
            raise SnapshotUnusable("it has no Gateway, and its field `emptied` is not true")
        return snapshot
