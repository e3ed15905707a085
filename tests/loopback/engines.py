"""Engines on real sockets, for tests."""

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def engine(*options: str) -> Iterator[str]:
    """A simulated engine in a process of its own; its base URL, with /v1."""
    argv = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:0", *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http://"), line
        yield line.split()[-1]
    finally:
        process.terminate()
        assert process.wait(10) == 0
        process.stdout.close()


def metric(base_url: str, name: str) -> float:
    """One value from an engine's metrics page."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rpartition(" ")[2])
    raise AssertionError(f"{name} is not on the page")
