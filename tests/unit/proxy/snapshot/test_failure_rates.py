"""What the canary's judgement reads: counts of requests by Gateway, from the cells of all workers."""

from fleetgate.core.canary_analysis import AttemptCounts
from fleetgate.proxy.snapshot.failure_rates import FailureRateReader
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from tests.loopback.control_rig import board_of

ODD = 'a "b" \\ c'


def count(metrics: WorkerMetrics, name: str, times: int, **labels: str) -> None:
    if name == "fleetgate_requests_total":
        labels = {"gateway": labels["gateway"], "deployment": "a", "region": "eu", "outcome": labels["outcome"]}
    metrics.cells[metrics.counter(name, labels)] += times


def test_counts_are_read_by_gateway_and_outcome() -> None:
    memory = board_of(2)
    first, second = WorkerMetrics(memory, 0), WorkerMetrics(memory, 1)
    reader = FailureRateReader(memory)
    assert reader.of(0, [ODD]) == AttemptCounts()
    count(first, "fleetgate_requests_total", 7, gateway=ODD, outcome="ok")
    count(first, "fleetgate_requests_total", 2, gateway=ODD, outcome="failed")
    count(first, "fleetgate_requests_total", 1, gateway=ODD, outcome="interrupted")
    count(first, "fleetgate_requests_total", 50, gateway="other", outcome="failed")
    assert reader.of(0, [ODD]) == AttemptCounts(10, 3), "series made after the first read count too"
    count(second, "fleetgate_requests_total", 4, gateway=ODD, outcome="refused")
    count(second, "fleetgate_unavailable_total", 4, gateway=ODD)
    count(second, "fleetgate_denied_total", 5, status="500", code="internal_error")
    count(second, "fleetgate_denied_total", 9, status="401", code="invalid_api_key")
    assert reader.of_others(0, [ODD]) == AttemptCounts(9, 9)
    assert reader.of_others(1, [ODD]) == AttemptCounts(10, 3)
