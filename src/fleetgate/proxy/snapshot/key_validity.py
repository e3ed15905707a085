"""Which keys of a Snapshot are good now: not those revoked on this machine, none once the Snapshot is too old to trust.

By default a control plane that is away changes nothing for `max_stale_s`. FAULTS.md row 65.
"""

from pathlib import Path

import msgspec

from fleetgate.core.model import Snapshot
from fleetgate.ipc.revocation_list import REVOKED, read_revoked
from fleetgate.ipc.shared_memory import ControlPlaneCell, SharedMemory
from fleetgate.ipc.signed_file import PUBLIC_KEY, SignatureInvalid


class KeyValidity:
    """One worker's view. Units: `max_stale_s` 0 for no end."""

    def __init__(self, data_dir: Path, board: SharedMemory, max_stale_s: float) -> None:
        self._path = data_dir / REVOKED
        self._public_key_path = data_dir / PUBLIC_KEY
        self._board = board
        self._max_stale_s = max_stale_s
        self._seen: tuple[int, int] | None = None
        self._revoked: frozenset[str] = frozenset()
        self._begun_s = float("inf")
        self.stale = False
        self.refused = ""

    def silent_s(self, now_s: float) -> float:
        """Since when nothing was heard of the control plane; since ever where it never was."""
        heard_ms = self._board.control_plane[ControlPlaneCell.HEARTBEAT_MS]
        return now_s - heard_ms / 1000 if heard_ms else float("inf")

    def check(self, now_s: float) -> bool:
        """Ten times a second: whether other keys are good than at the last look. Cost: one `stat`, 2 µs."""
        before = self.stale, self._revoked
        # What was never heard of was away at least since this worker began: a machine that starts without its control
        # plane has as long as any other.
        self._begun_s = min(self._begun_s, now_s)
        silent_s = min(self.silent_s(now_s), now_s - self._begun_s)
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
            listed = read_revoked(self._path, self._public_key_path.read_bytes())
        except (SignatureInvalid, OSError, ValueError) as error:
            # Whoever can damage the list must not bring a revoked key back to life with that.
            self.refused = f"{self._path} is refused, and what it said before stays: {error}"
            return
        self._revoked = frozenset(revocation.id for revocation in listed)
        self.refused = ""

    def usable(self, snapshot: Snapshot) -> Snapshot:
        """The Snapshot with the keys that are good."""
        if self.stale:
            return msgspec.structs.replace(snapshot, keys=())
        if not self._revoked:
            return snapshot
        kept = tuple(key for key in snapshot.keys if key.id not in self._revoked)
        return msgspec.structs.replace(snapshot, keys=kept)
