"""Series read back from shared memory, and the two formats of `/metrics`."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from fleetgate.ipc.exposition import (
    BOUNDS_S,
    Family,
    HistogramSeries,
    exposition_text,
    read_series,
    series_families,
    series_name,
    wants_openmetrics,
)
from fleetgate.ipc.metrics_table import METRICS, Kind
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from tests.loopback.control_rig import board_of

ROUTE = {"gateway": "chat", "deployment": "a", "region": "eu"}
TTFT = "fleetgate_ttft_seconds"


def buckets_of(page: str, openmetrics: bool) -> dict[float, float]:
    """The buckets of TTFT as a monitoring system reads them."""
    read = read_openmetrics if openmetrics else read_text
    family = next(each for each in read(page) if each.name == TTFT)
    return {float(sample.labels["le"]): sample.value for sample in family.samples if sample.name.endswith("_bucket")}


def quantile_of(buckets: dict[float, float], share: float) -> float:
    """The quantile as PromQL's `histogram_quantile` computes it."""
    wanted = share * buckets[math.inf]
    below, lower = 0.0, 0.0
    for bound, total in sorted(buckets.items()):
        if total >= wanted and total > below:
            return lower + (bound - lower) * (wanted - below) / (total - below)
        below, lower = total, bound
    raise AssertionError("no bucket holds the quantile")


@settings(deadline=None)
@given(
    st.lists(st.floats(0.000512, 268.0) | st.sampled_from(BOUNDS_S[:-1]), min_size=1, max_size=50),
    st.floats(0.01, 0.999),
    st.booleans(),
)
def test_a_quantile_of_the_page_is_within_20_percent(durations: list[float], share: float, openmetrics: bool) -> None:
    memory = board_of(2)
    for index, duration_s in enumerate(durations):
        WorkerMetrics(memory, index % 2).histogram(TTFT, ROUTE).observe(duration_s)
    series = read_series(memory.series_totals())
    histogram = series.histogram(TTFT, gateway="chat")
    assert histogram.count == len(durations)
    assert histogram.sum_s == pytest.approx(sum(durations), abs=1e-6 * len(durations))
    exact = sorted(durations)[max(0, math.ceil(share * len(durations)) - 1)]
    found = quantile_of(buckets_of(exposition_text(series_families(series), openmetrics), openmetrics), share)
    assert found == pytest.approx(histogram.quantile_s(share))
    assert exact * 0.8 <= found <= exact * 1.2


def test_every_bound_is_written() -> None:
    memory = board_of(1)
    WorkerMetrics(memory, 0).histogram(TTFT, ROUTE).observe(0.1)
    page = exposition_text(series_families(read_series(memory.series_totals())), True)
    assert sorted(buckets_of(page, True)) == [*BOUNDS_S, math.inf]


def test_buckets_of_a_worker_of_the_last_version_add_up() -> None:
    """Its bounds are powers of two microseconds."""
    memory = board_of(2)
    WorkerMetrics(memory, 0).histogram(TTFT, ROUTE).observe(0.1)
    for bit, count in ((9, 1), (17, 5), (28, 2)):
        bound = f"{(1 << bit) / 1e6:.6g}"
        at = memory.add_series(1, series_name(f"{TTFT}_bucket", {**ROUTE, "le": bound}))
        memory.series[at] = count
        assert float(bound) in BOUNDS_S
    memory.series[memory.add_series(1, series_name(f"{TTFT}_bucket", {**ROUTE, "le": "+Inf"}))] = 1
    buckets = buckets_of(exposition_text(series_families(read_series(memory.series_totals())), False), False)
    assert buckets[0.000512] == 1 and buckets[0.131072] == 7
    assert buckets[268.435] == 9 and buckets[math.inf] == 10


def test_an_empty_histogram_has_no_quantile() -> None:
    assert HistogramSeries({}).quantile_s(0.5) is None


def test_beyond_the_last_bucket_the_quantile_is_the_mean() -> None:
    assert HistogramSeries({math.inf: 2}, 800.0).quantile_s(0.99) == 400.0


@given(st.text(max_size=12))
def test_every_metric_is_valid_in_both_formats(value: str) -> None:
    families = []
    for metric in METRICS.values():
        family = Family(metric.name)
        if metric.kind is Kind.HISTOGRAM:
            family.samples.append((tuple((name, value) for name in metric.labels), HistogramSeries({0.1: 2}, 0.15)))
        else:
            family.add([value] * len(metric.labels), 3)
        families.append(family)
    openmetrics, text = exposition_text(families, True), exposition_text(families, False)
    assert openmetrics.endswith("# EOF\n") and text.endswith("\n") and "# EOF" not in text
    read = {family.name: family for family in read_openmetrics(openmetrics)}  # type: ignore[no-untyped-call]
    assert set(read) == {metric.family for metric in METRICS.values()}
    for metric in METRICS.values():
        family = read[metric.family]
        assert (family.type, family.unit, family.documentation) == (metric.kind, metric.unit, metric.help)
        assert all(sample.labels[name] == value for sample in family.samples for name in metric.labels)
    assert {family.name for family in read_text(text)} == {metric.family for metric in METRICS.values()}


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1", True),
        ("application/openmetrics-text;q=0.1, text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
    ],
)
def test_the_client_chooses_the_format(accept: str, wanted: bool) -> None:
    assert wants_openmetrics(accept) is wanted
