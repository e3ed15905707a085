"""Locks between processes on one machine: byte ranges of one file, freed by the kernel when their holder exits."""

import fcntl
import os
from pathlib import Path


class LockFile:
    """Exclusive locks by number: byte `slot` of the file is the lock of the Deployment in that slot.

    The byte after those of all Deployments is the lock of the worker that runs the health checks.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def lock(self, slot: int) -> None:
        """Take a lock, and wait for it. A holder keeps it for a sum and a write only."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, slot)

    def unlock(self, slot: int) -> None:
        """Free a lock."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot)

    def try_lock(self, slot: int) -> bool:
        """Take a lock if it is free, and return whether this process has it now."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except OSError:
            return False
        return True
