"""`--ops-listen`: liveness, readiness and metrics as functions of a request head."""

import json

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fleetgate.ipc.exposition import OPENMETRICS_TYPE, TEXT_TYPE
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.ops_server import OpsServer
from tests.loopback.control_rig import board_of


def response_to(memory: SharedMemory, request_line: str, *fields: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    data = OpsServer(memory).response("\r\n".join([request_line, *fields, "", ""]).encode()).decode()
    head, _, body = data.partition("\r\n\r\n")
    status_line, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return int(status_line.split(" ")[1]), headers, body


@pytest.fixture
def memory() -> SharedMemory:
    memory = board_of(2)
    memory.set(1, WorkerCell.PID, 7)
    memory.set(1, WorkerCell.ACCEPTING, 1)
    memory.set(1, WorkerCell.SNAPSHOT_VERSION, 12)
    return memory


def test_ready_with_one_worker_that_accepts(memory: SharedMemory) -> None:
    status, headers, body = response_to(memory, "GET /readyz HTTP/1.1")
    assert status == 200 and headers["content-type"] == "application/json"
    assert json.loads(body)["snapshot"]["version"] == 12 and json.loads(body)["reasons"] == []
    memory.set(1, WorkerCell.ACCEPTING, 0)
    status, _, body = response_to(memory, "GET /readyz HTTP/1.1")
    assert status == 503 and json.loads(body)["reasons"] == ["no worker accepts connections"]


def test_metrics_come_in_both_formats_with_histograms(memory: SharedMemory) -> None:
    metrics = WorkerMetrics(memory, 1)
    labels = {"gateway": "chat", "deployment": "a", "region": "eu"}
    metrics.histogram("fleetgate_ttft_seconds", labels).observe(0.2)
    metrics.add("fleetgate_unavailable_total", {"gateway": "chat"})
    status, headers, text = response_to(memory, "GET /metrics HTTP/1.1")
    assert (status, headers["content-type"]) == (200, TEXT_TYPE)
    assert 'fleetgate_unavailable_total{gateway="chat"} 1.0\n' in text
    assert 'fleetgate_snapshot_version{worker="1"} 12.0\n' in text and "fleetgate_control_silent_seconds -1.0" in text
    assert 'fleetgate_ttft_seconds_count{deployment="a",gateway="chat",region="eu"} 1.0\n' in text
    fields = ("Host: ops", "ACCEPT: application/openmetrics-text; version=1.0.0", "accept: text/plain;q=0.1")
    status, headers, text = response_to(memory, "GET /metrics?x=1 HTTP/1.1", *fields)
    assert (status, headers["content-type"]) == (200, OPENMETRICS_TYPE)
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    assert {"fleetgate_ttft_seconds", "gen_ai_server_time_to_first_token_seconds"} <= {each.name for each in families}


def test_head_has_no_body_and_other_methods_and_paths_are_errors(memory: SharedMemory) -> None:
    status, headers, body = response_to(memory, "HEAD /healthz HTTP/1.1")
    assert (status, headers["content-length"], body) == (200, "3", "")
    assert response_to(memory, "POST /metrics HTTP/1.1")[0] == 405
    assert response_to(memory, "GET /other HTTP/1.1")[0] == 404
    assert response_to(memory, "nonsense")[0] == 405
