"""A small process that runs one engine of provider `local`, and ends it on a stop or when the supervisor exits.

It outlives the control process that started it, so engines run on while the control process restarts. It does not
restart an engine that failed: it writes what happened into its state file, and the reconciler decides.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TERM_GRACE_S = 5.0
LOG_BYTES_MAX = 8 * 1024 * 1024
_LOG_CHECK_S = 10.0
_PR_SET_PDEATHSIG = 1


def process_start(pid: int) -> int:
    """Return when a process started; 0 if it does not run. Pid and start together identify a process.

    Units: kernel ticks.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace a state file at once; only its owner can read it."""
    draft = path.with_suffix(".tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(state, file)
    draft.replace(path)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process group; it is no error if the group is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def die_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends; do nothing if the kernel cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class LocalShim:
    """Runs one engine.

    Shape: `job` has `state` (the fields of the state file), `state_file`, `log_file`, `argv`, `env`, `life_fd`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._state: dict[str, Any] = job["state"]
        self._state_file = Path(job["state_file"])
        self._life_fd: int = job["life_fd"]
        self._argv: list[str] = job["argv"]
        self._env: dict[str, str] = job["env"]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._log_fd = os.open(job["log_file"], flags, 0o600)
        self._wake_fd, wake_write_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(wake_write_fd, False)
        signal.set_wakeup_fd(wake_write_fd)
        self._stop_requested = False
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the poll
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self._stop_requested = True

    def run(self) -> None:
        """Start the engine, wait until it exits or must end, and write its last state."""
        self._state |= {"keeper_pid": os.getpid(), "keeper_start": process_start(os.getpid())}
        try:
            engine = subprocess.Popen(  # noqa: S603 - the operator's own command
                self._argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._log_fd,
                stderr=self._log_fd,
                start_new_session=True,
                # For a shim that is killed by force; in every other case the shim ends the engine itself.
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
        except OSError as error:
            self._write(ended=f"`{self._argv[0]}` cannot be run: {error.strerror}", bad_command=True)
            return
        self._write(engine_pid=engine.pid, engine_start=process_start(engine.pid))
        self._wait(engine)
        if engine.returncode is None:
            self._write(stopping=True)
            self._end(engine)
            self._state_file.unlink(missing_ok=True)
        else:
            signal_group(engine.pid, signal.SIGKILL)  # processes that it left running
            self._write(ended=_exit_sentence(engine.returncode), exit_code=engine.returncode)

    def _write(self, **changes: object) -> None:
        self._state |= changes
        # A data directory that was removed meanwhile must not prevent the engine's end.
        with contextlib.suppress(FileNotFoundError):
            write_state(self._state_file, self._state)

    def _wait(self, engine: subprocess.Popen[bytes]) -> None:
        """Return when the engine has exited, the supervisor has exited, or a stop is requested."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if self._life_fd >= 0:
            poll.register(self._life_fd, select.POLLIN)
        while engine.poll() is None and not self._stop_requested:
            for fd, _ in poll.poll(_LOG_CHECK_S * 1000):
                if fd == self._life_fd and not os.read(fd, 1):
                    return
                if fd == self._wake_fd:
                    os.read(fd, 4096)
            if os.fstat(self._log_fd).st_size > LOG_BYTES_MAX:
                os.ftruncate(self._log_fd, 0)  # both streams append, so the next line is the first

    def _end(self, engine: subprocess.Popen[bytes]) -> None:
        signal_group(engine.pid, signal.SIGTERM)
        end_s = time.monotonic() + TERM_GRACE_S
        while engine.poll() is None and (left_s := end_s - time.monotonic()) > 0:
            if select.select([self._wake_fd], [], [], left_s)[0]:
                os.read(self._wake_fd, 4096)
        signal_group(engine.pid, signal.SIGKILL)
        engine.wait()


def _exit_sentence(code: int) -> str:
    if code >= 0:
        return f"the engine exited with code {code}"
    try:
        return f"the engine was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"the engine was ended by signal {-code}"


def main() -> None:
    """Run the engine that the JSON on standard input describes."""
    LocalShim(json.load(sys.stdin)).run()


if __name__ == "__main__":
    main()
