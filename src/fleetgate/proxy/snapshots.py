"""The Snapshot file: looked at ten times a second, taken whole and signed, or not at all."""

import os
from pathlib import Path

import msgspec

from fleetgate.core.model import Snapshot, decode_snapshot
from fleetgate.providers.signing import NotSigned, verified

EMPTY = Snapshot(version=0, made_at_s=0.0)
SNAPSHOT_BYTES_MAX = 64 * 1024 * 1024


class SnapshotFile:
    """Where the publisher puts Snapshots. The last good one stays in use whatever happens to the file.

    Shape: `public_key` tells whose signature counts. A good Snapshot that came into use is kept beside the file, for a
    worker that starts while the file is damaged or gone.
    """

    def __init__(self, path: Path, public_key: bytes) -> None:
        self._path = path
        self._kept = path.with_name("snapshot.good")
        self._public_key = public_key
        self._seen = (0, 0, 0)
        self._bytes = b""
        self.refused = ""

    def changed(self) -> Snapshot | None:
        """The new Snapshot if the file has been replaced by a good one since the last look.

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
            snapshot = self._read(self._path)
        except (OSError, msgspec.MsgspecError, NotSigned) as error:
            self.refused = f"{self._path} is not a Snapshot to be used: {error}"
            return None
        self._seen = seen
        self.refused = ""
        return snapshot

    def last_good(self) -> Snapshot | None:
        """The Snapshot that was in use last, for a start without a good file."""
        try:
            return self._read(self._kept)
        except (OSError, msgspec.MsgspecError, NotSigned):
            return None

    def keep(self) -> None:
        """What was read last came into use: keep it. A disk that does not take it changes nothing for traffic."""
        temporary = self._kept.with_name(f".{self._kept.name}.{os.getpid()}")
        try:
            if self._kept.exists() and self._kept.read_bytes() == self._bytes:
                return  # another worker was quicker
            temporary.write_bytes(self._bytes)
            temporary.chmod(0o600)
            temporary.replace(self._kept)
        except OSError as error:
            self.refused = (
                f"{self._kept} cannot be written, and no start without the control plane would have it: {error}"
            )

    def _read(self, path: Path) -> Snapshot:
        if path.stat().st_size > SNAPSHOT_BYTES_MAX:
            raise NotSigned(f"it is over {SNAPSHOT_BYTES_MAX // 1024 // 1024} MiB")
        data = path.read_bytes()
        snapshot = decode_snapshot(verified(data, self._public_key))
        self._bytes = data
        return snapshot
