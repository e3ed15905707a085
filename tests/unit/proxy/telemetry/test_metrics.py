"""A worker's counters and histograms, also when there is no room for more series."""

import pytest

from fleetgate.ipc.exposition import read_series
from fleetgate.ipc.shared_memory import SERIES_MAX, WorkerCell
from fleetgate.proxy.telemetry.metrics import OTHER_SERIES, WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetrics, TokenEstimateError
from tests.loopback.control_rig import board_of

TTFT = "fleetgate_ttft_seconds"


def test_only_metrics_of_the_table_can_be_made() -> None:
    metrics = WorkerMetrics(board_of(1), 0)
    for make in (metrics.counter, metrics.add, metrics.histogram):
        with pytest.raises(ValueError, match="metrics_table"):
            make("fleetgate_surprises_total", {})


def test_a_restarted_worker_continues_its_counts() -> None:
    memory = board_of(2)
    for _ in range(3):
        WorkerMetrics(memory, 1).add("fleetgate_unavailable_total", {"gateway": "chat"})
    assert memory.series_totals()['fleetgate_unavailable_total{gateway="chat"}'] == 3


def test_label_sets_without_room_are_counted_as_other() -> None:
    memory = board_of(1)
    metrics = WorkerMetrics(memory, 0)
    gateways = SERIES_MAX + 100
    for number in range(gateways):
        metrics.add("fleetgate_unavailable_total", {"gateway": f"g{number}"})
    counts = read_series(memory.series_totals()).counts_by("fleetgate_unavailable_total", "gateway")
    assert sum(counts.values()) == gateways, "every one is counted"
    assert counts["other"] == gateways - (SERIES_MAX - OTHER_SERIES) + 1
    assert memory.series_totals()["fleetgate_series_overflow_total"] == counts["other"]
    request = RequestMetrics(metrics, "late", "d", "r")
    for step in range(29):
        request.ttft.observe(2.0**step / 1e6)
        request.tpot.observe(2.0**step / 1e6)
    request.outcome("ok")
    series = read_series(memory.series_totals())
    assert series.histogram(TTFT, gateway="other").count == 29
    assert series.histogram(TTFT, gateway="other").sum_s == pytest.approx((2**29 - 1) / 1e6)
    assert series.histogram("fleetgate_tpot_seconds", gateway="other").count == 29
    assert memory.get(0, WorkerCell.SERIES_COUNT) <= SERIES_MAX


def test_a_histogram_that_finds_no_room_goes_on_as_other() -> None:
    memory = board_of(1)
    metrics = WorkerMetrics(memory, 0)
    labels = {"gateway": "chat", "deployment": "a", "region": "eu"}
    histogram = metrics.histogram(TTFT, labels)
    histogram.observe(0.1)
    while not metrics.is_full():
        metrics.add("fleetgate_unavailable_total", {"gateway": f"g{memory.get(0, WorkerCell.SERIES_COUNT)}"})
    histogram.observe(0.1)
    histogram.observe(3.0)
    histogram.observe(0.1)
    series = read_series(memory.series_totals())
    own, other = series.histogram(TTFT, gateway="chat"), series.histogram(TTFT, gateway="other")
    assert own.count == 2 and own.sum_s == pytest.approx(0.2)
    assert other.count == 2 and other.sum_s == pytest.approx(3.1)


def test_token_estimates_are_compared_with_usage() -> None:
    memory = board_of(1)
    error = TokenEstimateError(WorkerMetrics(memory, 0), "prompt")
    error.record(100.0, 80)
    error.record(50.0, 60)
    totals = memory.series_totals()
    assert totals['fleetgate_estimated_tokens_total{kind="prompt"}'] == 150
    assert totals['fleetgate_token_error_total{kind="prompt"}'] == 30
