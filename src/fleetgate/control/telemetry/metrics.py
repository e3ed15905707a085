"""The board as Prometheus metrics, put together when it is scraped."""

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from fleetgate.control.context import Control
from fleetgate.control.snapshot.endpoint_status import endpoint_up
from fleetgate.control.telemetry.overload_metrics import gauges, usage_gauges
from fleetgate.control.telemetry.series import Labels, MetricSeries, read_series
from fleetgate.core.admission.work_ledger import WorkCell
from fleetgate.core.model import Snapshot
from fleetgate.core.usage_record import JOURNAL
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell

_HELP = {
    "fleetgate_requests": "Requests by how they ended.",
    "fleetgate_attempt_failures": "Attempts at an Endpoint that failed, by class.",
    "fleetgate_tokens": "Tokens as the engines reported them.",
    "fleetgate_ttft_seconds": "Seconds from a request's arrival to its first content event.",
    "fleetgate_tpot_seconds": "Seconds per output token after the first.",
    "fleetgate_request_duration_seconds": "Seconds from a request's arrival to its end.",
    "fleetgate_ttft_prediction_error_seconds": "Seconds by which a predicted TTFT was off, either way.",
    "fleetgate_estimated_tokens": "Tokens as estimated before the answer, of requests whose engine then told them.",
    "fleetgate_token_error": "Tokens by which those estimates were off, either way.",
    "fleetgate_unavailable": "Requests answered 503, which are a part of those refused.",
    "fleetgate_internal_errors": "Mistakes of a worker's own; its log tells where.",
    "fleetgate_loop_lags": "How often a worker's loop stood still for more than 250 ms.",
    "fleetgate_loop_lag_milliseconds": "For how long in all.",
    "fleetgate_injected_faults": "Requests struck by a fault that somebody injected.",
    "fleetgate_series_overflow": "Observations whose series found no room and were not kept apart.",
}
# The same histograms under the names of OpenTelemetry's conventions for generative AI, as Prometheus writes them.
_GEN_AI = {
    "fleetgate_ttft_seconds": "gen_ai_server_time_to_first_token_seconds",
    "fleetgate_tpot_seconds": "gen_ai_server_time_per_output_token_seconds",
    "fleetgate_request_duration_seconds": "gen_ai_server_request_duration_seconds",
}


def exposition(control: Control) -> bytes:
    """The text of `/metrics`."""
    registry = CollectorRegistry()
    registry.register(_BoardCollector(control))
    return generate_latest(registry)


class _BoardCollector(Collector):
    """Reads the board at each scrape."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are only known when the board is read."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Every metric."""
        board, snapshot = self._control.shared_memory, self._control.publisher.current
        if board is not None:
            series = read_series(board.series_totals())
            yield from _counters(series)
            yield from _histograms(series)
            yield from _workers(board)
            yield from gauges(board)
            yield from usage_gauges(board, self._control.data_dir.path / JOURNAL)
        if snapshot is not None:
            age = GaugeMetricFamily("fleetgate_snapshot_age_seconds", "Seconds since the Snapshot was made.")
            age.add_metric([], max(0.0, time.time() - snapshot.made_at_s))
            yield age
        if board is not None and snapshot is not None:
            yield from _gauges(board, snapshot)


def _counters(series: MetricSeries) -> Iterable[Metric]:
    for metric, cells in sorted(series.counters.items()):
        base = metric.removesuffix("_total")
        for names, rows in _by_label_names(cells):
            family = CounterMetricFamily(base, _HELP.get(base, base), labels=names)
            for values, count in rows:
                family.add_metric(values, count)
            yield family


def _histograms(series: MetricSeries) -> Iterable[Metric]:
    for metric, cells in sorted(series.histograms.items()):
        for names, rows in _by_label_names(cells):
            families = [HistogramMetricFamily(metric, _HELP.get(metric, metric), labels=names)]
            if metric in _GEN_AI:
                families.append(HistogramMetricFamily(_GEN_AI[metric], _HELP.get(metric, metric), labels=names))
            for values, histogram in rows:
                buckets = [(_bound(bound), count) for bound, count in histogram.cumulated()]
                for family in families:
                    family.add_metric(values, buckets, histogram.sum_s)
            yield from families


def _by_label_names(cells: dict[Labels, Any]) -> list[tuple[list[str], list[tuple[list[str], Any]]]]:
    """A family has one set of label names; series of a metric that differ in them make several."""
    groups: dict[tuple[str, ...], list[tuple[list[str], Any]]] = {}
    for labels, value in sorted(cells.items()):
        names = tuple(name for name, _ in labels)
        groups.setdefault(names, []).append(([text for _, text in labels], value))
    return [(list(names), rows) for names, rows in groups.items()]


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else f"{bound:.6g}"


def _workers(board: SharedMemory) -> Iterable[Metric]:
    live = [worker for worker in range(board.workers) if board.get(worker, WorkerCell.PID)]
    yield GaugeMetricFamily("fleetgate_workers", "Workers that run.", value=len(live))
    restarts = sum(max(0, board.get(worker, WorkerCell.STARTS) - 1) for worker in range(board.workers))
    yield CounterMetricFamily("fleetgate_worker_restarts", "Workers started again after they ended.", value=restarts)
    connections = GaugeMetricFamily("fleetgate_connections", "Client connections that are open.", labels=["worker"])
    version = GaugeMetricFamily("fleetgate_snapshot_version", "The Snapshot a worker uses.", labels=["worker"])
    for worker in live:
        connections.add_metric([str(worker)], board.get(worker, WorkerCell.CONNECTIONS))
        version.add_metric([str(worker)], board.get(worker, WorkerCell.SNAPSHOT_VERSION))
    yield connections
    yield version


def _gauges(board: SharedMemory, snapshot: Snapshot) -> Iterable[Metric]:
    yield from _deployment_gauges(board, snapshot)
    yield from _endpoint_gauges(board, snapshot)
    queue = GaugeMetricFamily("fleetgate_queue", "Requests that wait for room.", labels=["gateway"])
    for gateway in snapshot.gateways:
        queue.add_metric([gateway.name], board.waiting_total(gateway.slot))
    yield queue


def _deployment_gauges(board: SharedMemory, snapshot: Snapshot) -> Iterable[Metric]:
    """What a Deployment takes and has: as learned, until then as written."""

    def gauge(name: str, told: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, told, labels=["deployment", "region"])

    in_flight = gauge("fleetgate_in_flight", "Requests in flight to a Deployment.")
    limit = gauge("fleetgate_limit", "Requests a Deployment may have, as learned or written; absent without a limit.")
    units = gauge("fleetgate_units", "CU of a Deployment, as written, from its Profile at the pace of now, or learned.")
    margin = gauge("fleetgate_margin", "Share of the TPOT target that is used; where room is predicted.")
    held = gauge("fleetgate_units_in_flight", "Cost in CU of the requests in flight; where room is predicted.")
    for deployment in snapshot.deployments:
        where = [deployment.name, deployment.region]
        in_flight.add_metric(where, board.in_flight_total(deployment.slot))
        learned = board.learned_limits(deployment.slot)
        limit_now = learned.limit if learned is not None else deployment.concurrency_max
        if limit_now:
            limit.add_metric(where, limit_now)
        if learned is not None:
            units.add_metric(where, learned.milliunits / 1000)
        if deployment.profile is not None:
            held.add_metric(where, board.milliunits_total(deployment.slot) / 1000)
            if learned is not None:
                margin.add_metric(where, learned.margin_permille / 1000)
    return [in_flight, limit, units, margin, held]


def _endpoint_gauges(board: SharedMemory, snapshot: Snapshot) -> Iterable[Metric]:
    at = ["deployment", "endpoint"]
    up = GaugeMetricFamily("fleetgate_endpoint_up", "Whether an Endpoint answers its probe.", labels=at)
    running = GaugeMetricFamily("fleetgate_engine_running", "Requests the engine says it runs.", labels=at)
    waiting = GaugeMetricFamily("fleetgate_engine_waiting", "Requests the engine says wait in it.", labels=at)
    kv = GaugeMetricFamily("fleetgate_engine_kv_ratio", "Share of the engine's KV cache in use.", labels=at)
    prefill = GaugeMetricFamily(
        "fleetgate_endpoint_prefill",
        "Whether an engine was seen to go on with what another had begun: 1 yes, 2 no, 0 not known.",
        labels=at,
    )
    work = GaugeMetricFamily(
        "fleetgate_work_tokens", "Token work that was sent to an Endpoint and has not ended.", labels=[*at, "kind"]
    )
    for deployment in snapshot.deployments:
        for endpoint in deployment.endpoints:
            which = [deployment.name, f"{endpoint.origin}{endpoint.base_path}"]
            up.add_metric(which, int(endpoint_up(board, endpoint.slot)))
            prefill.add_metric(which, board.signal(endpoint.slot, EndpointSignal.PREFILL))
            if board.signal(endpoint.slot, EndpointSignal.LOAD_SEEN_MS):
                running.add_metric(which, board.signal(endpoint.slot, EndpointSignal.RUNNING))
                waiting.add_metric(which, board.signal(endpoint.slot, EndpointSignal.WAITING))
                kv.add_metric(which, board.signal(endpoint.slot, EndpointSignal.KV_PERMILLE) / 1000)
            work.add_metric([*which, "pending"], board.work_total(endpoint.slot, WorkCell.PENDING_TOKENS))
            work.add_metric([*which, "kv"], board.work_total(endpoint.slot, WorkCell.KV_TOKENS))
    return [up, prefill, running, waiting, kv, work]
