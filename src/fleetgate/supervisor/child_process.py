"""A process that the supervisor keeps running."""

import subprocess
import sys

import msgspec


class ChildProcess(msgspec.Struct, kw_only=True):
    """One process to keep running. Shape: `env` is added to the supervisor's own; `fds` are inherited."""

    name: str
    argv: list[str]
    env: dict[str, str]
    fds: list[int]
    worker: int = -1  # the board's column, -1 for a process that has none
    essential: bool = False  # its first start must succeed, or nothing runs
    stop_last: bool = False
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts_in_a_row: int = 0
    start_at_s: float = 0.0
    beat: int = 0  # a worker's heartbeat at the last look
    still: int = 0  # looks since it changed
    renewing: bool = False  # it was asked to end, to be started again at once


def python_child(module: str, variable: str, config: bytes) -> tuple[list[str], dict[str, str]]:
    """The command and environment of one of our own processes."""
    return [sys.executable, "-m", module], {variable: config.decode()}
