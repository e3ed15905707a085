"""Locks by number between processes; the kernel frees them when their holder dies."""

import subprocess
import sys
from pathlib import Path

from fleetgate.ipc.file_locks import LockFile
from tests.waiting import wait_for

HOLDER = """
import sys, time
from pathlib import Path
from fleetgate.ipc.file_locks import LockFile
locks = LockFile(Path(sys.argv[1]))
locks.lock(3)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_lock_excludes_other_processes_until_its_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "ledger.lock"
    locks = LockFile(path)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
            assert not locks.try_lock(3)
            assert locks.try_lock(4)
        finally:
            holder.kill()
        wait_for(lambda: locks.try_lock(3))
    locks.unlock(3)
    assert path.stat().st_mode & 0o777 == 0o600
