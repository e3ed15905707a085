"""Which keys of a Snapshot are valid: all but those revoked on this machine; none once the control plane is silent.

Keys stay valid without a control plane for `max_stale_s`, which by default has no end. faults.md row 65.
"""

from pathlib import Path

import msgspec

from fleetgate.core.model import Snapshot
from fleetgate.ipc.revocation_list import REVOKED, read_revoked
from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory
from fleetgate.ipc.signed_file import PUBLIC_KEY, SignatureInvalid


class KeyValidity:
    """The validity of keys in one worker. Units: `max_stale_s` 0 for no end."""

    def __init__(self, data_dir: Path, shared: SharedMemory, max_stale_s: float) -> None:
        self._path = data_dir / REVOKED
        self._public_key_path = data_dir / PUBLIC_KEY
        self._shared = shared
        self._max_stale_s = max_stale_s
        self._seen: tuple[int, int] | None = None
        self._revoked: frozenset[str] = frozenset()
        self._first_check_s = float("inf")
        self.stale = False
        self.refused = ""

    def silent_s(self, now_s: float) -> float:
        """The time since the control plane's last heartbeat; infinite before the first."""
        heartbeat_ms = self._shared.control_plane[ControlPlaneCell.HEARTBEAT_MS]
        return now_s - heartbeat_ms / 1000 if heartbeat_ms else float("inf")

    def check(self, now_s: float) -> bool:
        """Whether the valid keys changed since the last call. Called ten times a second. Cost: one `stat`, 2 µs."""
        before = self.stale, self._revoked
        # Silence counts from this worker's start at the earliest. A machine that starts without its control plane thus
        # has the whole of `max_stale_s`.
        self._first_check_s = min(self._first_check_s, now_s)
        silent_s = min(self.silent_s(now_s), now_s - self._first_check_s)
        self.stale = 0 < self._max_stale_s < silent_s
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns)
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen = seen
            self._read()
        return (self.stale, self._revoked) != before

    def _read(self) -> None:
        try:
            revocations = read_revoked(self._path, self._public_key_path.read_bytes())
        except (SignatureInvalid, OSError, ValueError) as error:
            # Damage to the list must not make a revoked key valid again.
            self.refused = f"{self._path} is refused, and the keys revoked before stay revoked: {error}"
            return
        self._revoked = frozenset(revocation.id for revocation in revocations)
        self.refused = ""

    def usable(self, snapshot: Snapshot) -> Snapshot:
        """The Snapshot without the keys that are not valid."""
        if self.stale:
            return msgspec.structs.replace(snapshot, keys=())
        if not self._revoked:
            return snapshot
        kept = tuple(key for key in snapshot.keys if key.id not in self._revoked)
        return msgspec.structs.replace(snapshot, keys=kept)
