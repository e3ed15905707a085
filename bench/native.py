"""The mock upstream and the load client: two small C programs, so that the machine's time goes to the proxy."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.machine import Cores

HERE = Path(__file__).parent
OUT = HERE / ".out"
LOAD_S_MAX = 180.0


class CannotBench(Exception):
    """The benchmark cannot run; the text names what is missing and what to do."""


class WrongAnswer(Exception):
    """Answers that passed a proxy differ from what the mock sent."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock of this checkout, because two benchmarks at once would measure each other.

    Raises: `CannotBench` when another one runs.
    """
    OUT.mkdir(exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotBench("another benchmark of this checkout is running; wait until it has ended") from None
        yield


def build() -> None:
    """Compile each program that is older than its source.

    Raises: `CannotBench` without a C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotBench("no C compiler for the mock and the load client: apt-get install gcc libc6-dev")
    OUT.mkdir(exist_ok=True)
    for name in ("mock", "load"):
        source, program = HERE / f"{name}.c", OUT / name
        if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
            continue
        plain = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(program), str(source)]
        with_tls = [*plain, "-DWITH_TLS", "-l:libssl.so.3"]
        attempts = [with_tls, plain] if name == "load" else [plain]
        results = [subprocess.run(attempts[0], capture_output=True, text=True, check=False)]
        if results[0].returncode and len(attempts) > 1:
            results.append(subprocess.run(attempts[1], capture_output=True, text=True, check=False))
        if results[-1].returncode:
            raise CannotBench(f"{source} does not compile: {results[-1].stderr.strip()}")


class Mock:
    """The simulated model server, running until it is closed."""

    def __init__(self, cores: Cores) -> None:
        self._process = subprocess.Popen(
            [str(OUT / "mock"), "0"], stdout=subprocess.PIPE, text=True, preexec_fn=lambda: _pin_self(cores.load)
        )
        assert self._process.stdout is not None
        word, _, port = self._process.stdout.readline().partition(" ")
        if word != "ready":
            raise CannotBench("the mock upstream did not start; its message is above")
        self.port = int(port)

    @property
    def pid(self) -> int:
        """Its process id, for pinning it to other cores."""
        return self._process.pid

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _pin_self(cpus: list[int]) -> None:
    os.sched_setaffinity(0, cpus)


def run_load(
    options: dict[str, object], cores: Cores, on_mark: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the client once and return its results; `on_mark` is called as the measured window opens and closes.

    Raises: `WrongAnswer` when any answer was wrong, late beyond reason or missing.
    """
    argv = [str(OUT / "load")]
    for name, value in options.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    client = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: _pin_self(cores.load)
    )
    assert client.stdout is not None and client.stderr is not None
    last: dict[str, Any] = {}
    try:
        for line in client.stdout:
            last = json.loads(line)
            on_mark(last["mark"], last)
        client.wait(LOAD_S_MAX)
    finally:
        client.kill()
        client.wait()
    said = client.stderr.read().strip()
    if last.get("mark") != "done":
        raise WrongAnswer(f"the load client ended early: {said or client.returncode}")
    if last["errors"]:
        raise WrongAnswer(f"{last['errors']} wrong answers; the first: {last['error']}")
    return last
