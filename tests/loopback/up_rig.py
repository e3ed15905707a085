"""`fleetgate up` as an operator runs it: the whole product on loopback, with a file, a data directory and a key."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

from tests.waiting import wait_for

COMMAND = [sys.executable, "-m", "fleetgate.main"]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=timeout_s, check=False)


def deployment(name: str, url: str, **fields: Any) -> dict[str, Any]:
    """A Deployment document for model `m`."""
    base = {"kind": "Deployment", "name": name, "region": f"region-{name}", "engine": "vllm", "url": url}
    return {**base, "models": [{"name": "m"}], **fields}


def gateway(name: str, *deployments: str, **fields: Any) -> dict[str, Any]:
    """A Gateway document over these Deployments, ranked in their order."""
    upstreams = [{"deployment": each} for each in deployments]
    base = {"kind": "Gateway", "name": name, "domain": "test", "protocol": "openai", "strategy": "overflow"}
    return {**base, "upstreams": upstreams, **fields}


class Up:
    """One running `fleetgate up`."""

    def __init__(self, folder: Path, documents: list[dict[str, Any]], *flags: str) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.config = folder / "fleet.yaml"
        self.log = folder / "up.log"
        self.port, self.tls_port, self.api_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.api = f"http://127.0.0.1:{self.api_port}"
        self._flags = flags
        self.env: dict[str, str] = {}  # added to this process's own
        self.write(documents)
        self.process: subprocess.Popen[bytes]

    def write(self, documents: list[dict[str, Any]]) -> None:
        """Write the config file."""
        self.config.write_text(yaml.safe_dump_all(documents))

    def __enter__(self) -> Self:
        words = ["up", "--config", str(self.config), "--data-dir", str(self.data_dir), "--workers", "2"]
        words += ["--listen", f"127.0.0.1:{self.port}", "--api-listen", f"127.0.0.1:{self.api_port}", *self._flags]
        if "--tls" in self._flags:
            words += ["--tls-listen", f"127.0.0.1:{self.tls_port}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*COMMAND, *words], stdout=log, stderr=log, env={**os.environ, **self.env})
        try:
            wait_for(lambda: self.process.poll() is not None or self.is_ready())
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.__exit__(None, None, None)  # `with` does not call it for what fails in here
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(45)

    def is_ready(self) -> bool:
        """Whether `/readyz` says so."""
        try:
            return httpx2.get(f"{self.api}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One client command against it."""
        return run(*words, "--data-dir", str(self.data_dir))

    def new_key(self, name: str, *words: str) -> str:
        """Create a key and return it."""
        made = self.cli("keys", "create", name, "-o", "json", *words)
        assert made.returncode == 0, made.stderr
        return str(json.loads(made.stdout)["key"])

    def children(self, module: str) -> list[int]:
        """The process ids of its children that run a module."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and module.encode() in words:
                found.append(int(entry.name))
        return found

    def ask(self, key: str = "", model: str = "m", **fields: Any) -> httpx2.Response:
        """One chat completion that is not streamed."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, **fields}
        return httpx2.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=30, trust_env=False)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    """Kill a process that the test itself started."""
    os.kill(pid, signal.SIGKILL)
