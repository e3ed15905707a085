"""The keeper: a small process that runs one engine of provider `local` and ends it when nobody wants it any more.

It outlives the control process that started it, so that engines go on while that one restarts, and it ends its engine
when the supervisor is gone. It restarts nothing: what happened is in its state file, and the reconciler decides.
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
_LOG_LOOK_S = 10.0
_PR_SET_PDEATHSIG = 1


def process_start(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0 when there is none. With the pid it names a process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace a state file whole, readable by its owner only."""
    draft = path.with_suffix(".tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(state, file)
    draft.replace(path)


def signal_group(pid: int, number: int) -> None:
    """Signal a process group, which may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def die_with_parent(number: int) -> None:
    """Ask the kernel for a signal when the parent ends, however it ends; where it cannot, do nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class LocalShim:
    """Runs one engine.

    Shape: `job` has `state` (the fields that the state file keeps), `state_file`, `log_file`, `argv`, `env`, `life_fd`.
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
        self._asked_to_stop = False
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the poll
        signal.signal(signal.SIGTERM, self._on_term)

    def _on_term(self, *_: object) -> None:
        self._asked_to_stop = True

    def run(self) -> None:
        """Start the engine, wait until it ends or must end, and leave the state behind."""
        self._state |= {"keeper_pid": os.getpid(), "keeper_start": process_start(os.getpid())}
        try:
            engine = subprocess.Popen(  # noqa: S603 - the operator's own command
                self._argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._log_fd,
                stderr=self._log_fd,
                start_new_session=True,
                # Only for a keeper killed by force; every other end of it ends the engine in order.
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
            signal_group(engine.pid, signal.SIGKILL)  # what it left behind
            self._write(ended=_how_it_ended(engine.returncode), exit_code=engine.returncode)

    def _write(self, **news: object) -> None:
        self._state |= news
        # A data directory that was removed under us must not stop the engine's end.
        with contextlib.suppress(FileNotFoundError):
            write_state(self._state_file, self._state)

    def _wait(self, engine: subprocess.Popen[bytes]) -> None:
        """Return when the engine has ended, the supervisor is gone, or somebody asks to stop."""
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if self._life_fd >= 0:
            poll.register(self._life_fd, select.POLLIN)
        while engine.poll() is None and not self._asked_to_stop:
            for fd, _ in poll.poll(_LOG_LOOK_S * 1000):
                if fd == self._life_fd and not os.read(fd, 1):
                    return
                if fd == self._wake_fd:
                    os.read(fd, 4096)
            if os.fstat(self._log_fd).st_size > LOG_BYTES_MAX:
                os.ftruncate(self._log_fd, 0)  # both write by appending, so the next line is the first

    def _end(self, engine: subprocess.Popen[bytes]) -> None:
        signal_group(engine.pid, signal.SIGTERM)
        end_s = time.monotonic() + TERM_GRACE_S
        while engine.poll() is None and (left_s := end_s - time.monotonic()) > 0:
            if select.select([self._wake_fd], [], [], left_s)[0]:
                os.read(self._wake_fd, 4096)
        signal_group(engine.pid, signal.SIGKILL)
        engine.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"it ended by itself with exit code {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"


def main() -> None:
    """Run one engine, as the JSON on standard input says."""
    LocalShim(json.load(sys.stdin)).run()


if __name__ == "__main__":
    main()
