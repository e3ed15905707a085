"""The interface of a compared proxy, and what most of them share: start, wait, stop."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bench.machine import Cores, family

START_S_MAX = 60.0
STOP_S_MAX = 5.0
HERE = Path(__file__).parent.parent
VENVS = HERE / ".venvs"
LOCKS = HERE / "locks"
LONGEST_MESSAGE = 600


class Absent(Exception):
    """A peer cannot take part; the text is one sentence with the reason and the remedy."""


@dataclass(frozen=True)
class Site:
    """Where a proxy is to run. Shape: `tls` is one PEM file with certificate and key, None for no TLS listener."""

    folder: Path
    mock_port: int
    cores: Cores
    workers: int
    tls: Path | None


@dataclass
class Running:
    """A proxy that serves.

    Shape: `charged` are the processes whose CPU and memory count, `beside` the others it needs; `process` leads their
    group and is None for the mock itself, which is not a proxy.
    """

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    tls_port: int = 0
    key: str = "sk-bench"
    charged: Callable[[], list[int]] = field(default=lambda: [])
    beside: Callable[[], list[int]] = field(default=lambda: [])

    def stop(self) -> None:
        """End its process group."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second for the rest of the group
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(STOP_S_MAX)


class Peer(Protocol):
    """A proxy that can be measured.

    Shape: `slow` ones get little load and are left out of measurements that they cannot carry; `exact` ones
    pass answers on byte for byte, so that lengths and event counts can be checked.
    """

    name: str
    slow: bool
    exact: bool
    about: str

    def version(self) -> str:
        """Its version, installing it if it can be.

        Raises: `Absent`.
        """

    def start(self, site: Site) -> Running:
        """Start it in front of the mock.

        Raises: `Absent`.
        """


def launch(argv: list[str], site: Site, name: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program in its own process group on the proxy's cores, with its output in a file."""
    with (site.folder / f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            argv,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=site.folder,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, site.cores.proxy),
        )


def serve(argv: list[str], site: Site, name: str, port: int, env: dict[str, str] | None = None) -> Running:
    """Start a program and wait until it accepts on its port; all its processes are charged.

    Raises: `Absent` with its last output if it does not.
    """
    process = launch(argv, site, name, env)
    running = Running(name, port, process, charged=lambda: family(process.pid))
    wait_until(lambda: accepts(port), running, site)
    return running


def wait_until(ready: Callable[[], bool], running: Running, site: Site) -> None:
    """Wait for a condition while the process lives.

    Raises: `Absent` with the process's last output.
    """
    until = time.monotonic() + START_S_MAX
    served = False
    try:
        while not (served := ready()):
            if running.process is None or running.process.poll() is not None or time.monotonic() > until:
                words = (site.folder / f"{running.name}.out").read_text(errors="replace").strip()
                raise Absent(f"{running.name} did not start: {words[-LONGEST_MESSAGE:] or 'without any output'}")
            time.sleep(0.05)
    finally:
        if not served:  # also when the run is interrupted here
            running.stop()


def accepts(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def installed(name: str) -> Path:
    """A peer's own virtual environment, made from its lock file the first time; returns its `bin`.

    Raises: `Absent` when the packages cannot be installed.
    """
    lock, venv = LOCKS / f"{name}.txt", VENVS / name
    stamp = venv / ".ready"
    if stamp.exists() and stamp.read_bytes() == lock.read_bytes():
        return venv / "bin"
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for argv in ([sys.executable, "-m", "venv", str(venv)], [*pip, "--require-hashes", "--requirement", str(lock)]):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Absent(f"{name} could not be installed from {lock.name}: {done.stderr.strip()[-LONGEST_MESSAGE:]}")
    stamp.write_bytes(lock.read_bytes())
    return venv / "bin"


def locked_version(name: str, package: str) -> str:
    """The version of a package in a peer's lock file."""
    for line in (LOCKS / f"{name}.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.removeprefix(f"{package}==").split()[0]
    raise Absent(f"{package} is not in {name}.txt; create the lock again with bench/locks/lock.sh")
