"""Managed Deployments through the whole control process: started, published, scaled, carried over a restart, ended."""

import sys
from pathlib import Path
from typing import Any

import httpx2

from fleetgate.core.model import Deployment
from tests.loopback.control_rig import GATEWAY, ControlRig
from tests.waiting import wait_for

CLUSTER = {"kind": "Cluster", "name": "home", "provider": "local", "region": "us-east", "labels": {"site": "a"}}


def managed(replicas: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:{port}", "--model", "llama"]
    return {
        "kind": "Deployment",
        "name": "own",
        "cluster": "home",
        "models": [{"name": "llama"}],
        "engine": "vllm",
        "workload": {"command": command},
        "replicas": {"committed": replicas},
        "capacity": {"concurrency": 8},
    }


def published(rig: ControlRig) -> Deployment:
    (deployment,) = rig.snapshot().deployments
    return deployment


def answers(origin: str) -> bool:
    try:
        return httpx2.get(f"{origin}/health", timeout=2.0, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def test_replicas_are_published_when_ready_and_outlive_the_control_process(tmp_path: Path) -> None:
    gateway = {**GATEWAY, "upstreams": [{"deployment": "own"}]}
    with ControlRig(tmp_path / "data") as rig:
        with rig.client() as api:
            answer = api.post("/api/v1/apply", json={"documents": [CLUSTER, managed(1), gateway]})
            assert answer.status_code == 200, answer.text
            assert published(rig).endpoints == ()
            wait_for(lambda: len(published(rig).endpoints) == 1)
            first = published(rig).endpoints[0]
            assert answers(first.origin)
            assert (published(rig).region, published(rig).labels) == ("us-east", {"site": "a"})
            assert (published(rig).concurrency_max, published(rig).egress_checked) == (8, False)
            assert api.put("/api/v1/deployments/own", json=managed(2)).status_code == 200
            assert published(rig).concurrency_max == 4, "half of the desired replicas are ready"
            wait_for(lambda: len(published(rig).endpoints) == 2)
            assert published(rig).concurrency_max == 8
            assert first in published(rig).endpoints, "an Endpoint keeps its slot"

        rig.act_as_worker(0, rig.snapshot().version)
        before = rig.snapshot()
        rig.kill()
        assert all(answers(endpoint.origin) for endpoint in before.deployments[0].endpoints)
        rig.start()
        assert rig.snapshot() == before, "a restart takes nothing away"

        with rig.client() as api:
            assert api.delete("/api/v1/gateways/chat").status_code == 200
            assert api.delete("/api/v1/deployments/own").status_code == 200
            wait_for(lambda: not any(answers(endpoint.origin) for endpoint in before.deployments[0].endpoints))
            sentences = [item["sentence"] for item in api.get("/api/v1/events").json()["items"]]
            assert any("is ready" in sentence for sentence in sentences)


def test_replicas_end_with_the_supervisor(tmp_path: Path) -> None:
    with ControlRig(tmp_path / "data") as rig:
        with rig.client() as api:
            assert api.post("/api/v1/apply", json={"documents": [CLUSTER, managed(1)]}).status_code == 200
        wait_for(lambda: len(published(rig).endpoints) == 1)
        origin = published(rig).endpoints[0].origin
        rig.end_life()
        wait_for(lambda: not answers(origin))
