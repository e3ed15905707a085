"""Fleetgate itself, with everything on: keys, ledger, metrics, access log, HTTPS listener."""

import http.client
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.machine import command_of, family, free_port, pin
from bench.peers.base import Absent, Running, Site, launch, wait_until
from bench.revision import SOURCE

COMMAND = [sys.executable, "-m", "fleetgate.main"]
CONFIG = """\
kind: Deployment
name: mock
region: here
models: [{{name: bench-model}}]
engine: vllm
url: http://127.0.0.1:{mock_port}/v1
capacity: {{concurrency: 4000, units: 100}}
---
kind: Gateway
name: bench
domain: localhost
protocol: openai
strategy: overflow
upstreams: [{{deployment: mock}}]
"""
WORKER = "fleetgate.proxy.worker"


class Fleetgate:
    """The workers are charged; supervisor and control process run beside them, on the other cores."""

    name = "fleetgate"
    slow = False
    exact = True
    about = "keys, ledger, metrics, access log to a file; workers only"

    def __init__(self, source: Path = SOURCE, config: str = CONFIG, env: dict[str, str] | None = None) -> None:
        """Run the package under `source`, by default this tree's; `env` is added to its environment."""
        self._config = config
        self._env = {"PYTHONPATH": str(source), **(env or {})}

    def version(self) -> str:
        """Its version, from its own package."""
        return importlib.metadata.version("fleetgate")

    def start(self, site: Site) -> Running:
        """Start it, wait until it is ready and make a key."""
        port, tls_port, api_port = free_port(), free_port(), free_port()
        name = f"{self.name}-{site.workers}"
        data_dir, config = site.folder / f"{name}.data", site.folder / f"{name}.yaml"
        config.write_text(self._config.format(mock_port=site.mock_port))
        argv = [*COMMAND, "up", "--config", str(config), "--data-dir", str(data_dir)]
        argv += ["--listen", f"127.0.0.1:{port}", "--api-listen", f"127.0.0.1:{api_port}"]
        if site.tls is not None:
            argv += ["--tls-listen", f"127.0.0.1:{tls_port}", "--tls", f"{site.tls},{site.tls}"]
        argv += ["--workers", str(site.workers), "--access-log", str(site.folder / f"{name}.access")]
        process = launch(argv, site, name, self._env)
        running = Running(name, port, process, tls_port)
        wait_until(lambda: _ready(api_port), running, site)
        running.charged = lambda: [pid for pid in family(process.pid) if WORKER in command_of(pid)]
        running.beside = lambda: [pid for pid in family(process.pid) if WORKER not in command_of(pid)]
        for pid in running.beside():
            pin(pid, site.cores.load)
        running.key = self._make_key(data_dir, running)
        if len(running.charged()) != site.workers:
            running.stop()
            raise Absent(f"fleetgate runs {len(running.charged())} workers instead of {site.workers}")
        return running

    def _make_key(self, data_dir: Path, running: Running) -> str:
        env = {**os.environ, **self._env}
        argv = [*COMMAND, "keys", "create", "bench", "-o", "json", "--data-dir", str(data_dir)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            running.stop()
            raise Absent(f"fleetgate made no key: {done.stderr.strip()}")
        return str(json.loads(done.stdout)["key"])


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
