"""A process that the supervisor keeps running."""

import subprocess
import sys

import msgspec


class ChildProcess(msgspec.Struct, kw_only=True):
    """One process to keep running.

    Units: `started_s` and `start_at_s` on the monotonic clock. Shape: `env` is added to the supervisor's own
    environment; `fds` are inherited.
    """

    name: str
    argv: list[str]
    env: dict[str, str]
    fds: list[int]
    worker: int = -1  # its column in shared memory, -1 if it has none
    essential: bool = False  # if its first start fails, `fleetgate up` exits with its exit code
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts_in_a_row: int = 0
    start_at_s: float = 0.0
    heartbeat: int = 0  # a worker's heartbeat at the last poll
    polls_without_heartbeat: int = 0
    restart_on_exit: bool = False  # the supervisor ended it, and starts it again without a pause


def python_child(module: str, variable: str, config: bytes) -> tuple[list[str], dict[str, str]]:
    """Return the command and the added environment of one of Fleetgate's own processes."""
    return [sys.executable, "-m", module], {variable: config.decode()}
