"""Every metric: its name, type, labels, unit and help. A metric that is not in this table cannot be made.

docs/reference/metrics.md is generated from it.
"""

from enum import StrEnum
from typing import NamedTuple

# Each octave of microseconds is split in four, near its fourth roots, so that an interpolated quantile is at most 20 %
# off the true one. Powers of two are bounds: histograms of versions that had only those add up with these.
_PARTS = (76, 90, 107, 128)  # upper bounds in 64ths of the lower end of an octave
BOUNDS_US = (512, *((part << octave) // 64 for octave in range(9, 28) for part in _PARTS))  # 0.5 ms to 268 s
OCTAVE_PARTS = bytes(sum(value >= part for part in _PARTS) for value in range(128))  # by the seven highest bits
_RESOURCE_LABELS = frozenset({"gateway", "deployment", "region", "fault"})


def step_of(bits: int, part: int) -> int:
    """The index into `BOUNDS_US` for a bit length and a part of the octave; one beyond the last bound at the end."""
    return min(max(0, 4 * (bits - 10) + 1 + part), len(BOUNDS_US)) if bits > 9 else 0


def bound_label(step: int) -> str:
    """The `le` label of a bucket, in seconds. Shape: `step` is an index into `BOUNDS_US`, or one beyond them."""
    return f"{BOUNDS_US[step] / 1e6:.6g}" if step < len(BOUNDS_US) else "+Inf"


class Kind(StrEnum):
    """The types of the Prometheus text format."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricsPage(StrEnum):
    """Which `/metrics` page has a metric."""

    BOTH = "both"
    API = "API"
    OPS = "ops"


class Metric(NamedTuple):
    """One metric. Shape: a counter's name ends in `_total`; `unit` is the end of the name without it, or empty."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    unit: str
    help: str
    listener: MetricsPage = MetricsPage.API
    copy_of: str = ""  # the metric that it repeats under another name

    @property
    def family(self) -> str:
        """The name in `# TYPE` lines of OpenMetrics."""
        return self.name.removesuffix("_total")


_ROUTE = ("gateway", "deployment", "region")
_PLACE = ("deployment", "region")
_ENDPOINT = ("deployment", "endpoint")


def _counter(name: str, labels: tuple[str, ...], text: str, unit: str = "") -> Metric:
    return Metric(name, Kind.COUNTER, labels, unit, text, MetricsPage.BOTH)


def _seconds(name: str, labels: tuple[str, ...], text: str, copy_of: str = "") -> Metric:
    return Metric(name, Kind.HISTOGRAM, labels, "seconds", text, MetricsPage.BOTH, copy_of)


def _gauge(
    name: str, labels: tuple[str, ...], text: str, unit: str = "", listener: MetricsPage = MetricsPage.API
) -> Metric:
    return Metric(name, Kind.GAUGE, labels, unit, text, listener)


_OUTCOMES = "ok, client_error, refused, failed, interrupted, client_gone"
_FAILURES = "full, broken, bad_output, unreachable, timeout, tls, credential, model_missing"
_TTFT = "Seconds from the complete request to the first content event; of an unstreamed answer to its end."
_TPOT = "Mean seconds between the events of one stream."
_DURATION = "Seconds from the complete request to the end of its answer."
_ROWS = (
    _counter(
        "fleetgate_requests_total",
        (*_ROUTE, "outcome"),
        f"Requests by outcome: {_OUTCOMES}. The deployment is empty if none was tried.",
    ),
    _counter(
        "fleetgate_unavailable_total", ("gateway",), 'Requests answered with status 503, a part of outcome="refused".'
    ),
    _counter("fleetgate_denied_total", ("status", "code"), "Requests rejected before routing, by error code."),
    _counter(
        "fleetgate_resumes_total",
        ("gateway", "way"),
        "Answers that another Deployment continued after a failure, by method: replay, prefill, tokens.",
    ),
    _counter(
        "fleetgate_attempt_failures_total", (*_ROUTE, "failure"), f"Attempts that failed, by failure: {_FAILURES}."
    ),
    _seconds("fleetgate_ttft_seconds", _ROUTE, _TTFT),
    _seconds("fleetgate_tpot_seconds", _ROUTE, _TPOT),
    _seconds("fleetgate_request_duration_seconds", _ROUTE, _DURATION),
    _seconds("gen_ai_server_time_to_first_token_seconds", _ROUTE, _TTFT, "fleetgate_ttft_seconds"),
    _seconds("gen_ai_server_time_per_output_token_seconds", _ROUTE, _TPOT, "fleetgate_tpot_seconds"),
    _seconds("gen_ai_server_request_duration_seconds", _ROUTE, _DURATION, "fleetgate_request_duration_seconds"),
    _counter(
        "fleetgate_tokens_total",
        (*_ROUTE, "kind"),
        "Tokens as the engines report them in usage, by kind: prompt, output.",
        "tokens",
    ),
    _seconds(
        "fleetgate_ttft_prediction_error_seconds", (), "Absolute difference between the predicted and the real TTFT."
    ),
    _counter(
        "fleetgate_estimated_tokens_total",
        ("kind",),
        "Tokens estimated before the answer, of requests with usage from the engine, by kind: prompt, output.",
        "tokens",
    ),
    _counter(
        "fleetgate_token_error_total",
        ("kind",),
        "Absolute differences between these estimates and the reported tokens, by kind: prompt, output.",
    ),
    _gauge("fleetgate_in_flight", _PLACE, "Requests in flight to a Deployment."),
    _gauge(
        "fleetgate_limit",
        _PLACE,
        "Requests a Deployment may have in flight, learned or configured. Absent if it has no limit.",
    ),
    _gauge(
        "fleetgate_units",
        _PLACE,
        "Capacity units (CU) of a Deployment: configured, from its Profile at the current speed, or learned.",
    ),
    _gauge("fleetgate_margin", _PLACE, "Share of the TPOT target in use. Absent without a Profile."),
    _gauge(
        "fleetgate_units_in_flight",
        _PLACE,
        "Capacity units (CU) of the requests in flight. Absent without a Profile.",
    ),
    _gauge("fleetgate_queue", ("gateway",), "Requests that wait for capacity."),
    _gauge(
        "fleetgate_work_tokens",
        (*_ENDPOINT, "kind"),
        "Tokens of the requests in flight, by kind: pending (prompts without a first token yet), kv (prompts and "
        "expected outputs).",
        "tokens",
    ),
    _gauge("fleetgate_endpoint_up", _ENDPOINT, "1 if the last readiness probe succeeded, else 0."),
    _gauge(
        "fleetgate_endpoint_prefill",
        _ENDPOINT,
        "Whether the engine can continue an answer that another engine began: 1 yes, 2 no, 0 unknown.",
    ),
    _gauge("fleetgate_engine_running", _ENDPOINT, "Running requests as the engine reports them."),
    _gauge("fleetgate_engine_waiting", _ENDPOINT, "Waiting requests as the engine reports them."),
    _gauge(
        "fleetgate_engine_kv_ratio",
        _ENDPOINT,
        "Share of the KV cache in use as the engine reports it.",
        "ratio",
    ),
    _gauge("fleetgate_snapshot_version", ("worker",), "Snapshot version in use, by worker.", "", MetricsPage.BOTH),
    _gauge("fleetgate_snapshot_age_seconds", (), "Seconds since the Snapshot was built.", "seconds", MetricsPage.BOTH),
    _gauge(
        "fleetgate_control_silent_seconds",
        (),
        "Seconds since the last heartbeat of the control plane; -1 if there was none.",
        "seconds",
        MetricsPage.OPS,
    ),
    _gauge("fleetgate_workers", (), "Running workers."),
    Metric(
        "fleetgate_worker_restarts_total", Kind.COUNTER, (), "", "Workers restarted after they ended.", MetricsPage.API
    ),
    _gauge("fleetgate_connections", ("worker",), "Open client connections."),
    _gauge(
        "fleetgate_short",
        ("worker", "what"),
        "1 while a worker is short of a resource: memory, connections, bodies, journal (the disk is full; usage rows "
        "wait in memory).",
    ),
    Metric(
        "fleetgate_journal_rows_lost_total",
        Kind.COUNTER,
        (),
        "",
        "Usage journal rows lost because neither the disk nor memory had room; the usage misses their attempts.",
        MetricsPage.API,
    ),
    _gauge(
        "fleetgate_journal_bytes",
        (),
        "Bytes of usage journals on disk; 4 to 8 MiB per worker, more if rows wait to be ingested.",
        "bytes",
    ),
    _counter(
        "fleetgate_loop_lags_total",
        (),
        "Times that a worker's event loop was blocked for more than 250 ms; the log and an Event name the code.",
    ),
    _counter(
        "fleetgate_loop_lag_milliseconds_total", (), "Milliseconds that these event loops were blocked.", "milliseconds"
    ),
    _counter(
        "fleetgate_internal_errors_total", (), "Internal errors of workers; each has a line in the log with its place."
    ),
    _counter(
        "fleetgate_injected_faults_total",
        ("fault", "deployment", "kind"),
        "Requests changed by an injected fault (`fleetgate fault inject`).",
    ),
    _counter(
        "fleetgate_log_lines_dropped_total",
        ("log",),
        "Log lines dropped because the reader or the disk was too slow, by log: access, record, process (of workers), "
        "control.",
    ),
    _counter(
        "fleetgate_series_overflow_total",
        (),
        'Label sets without room for a series; they are counted under gateway, deployment and region "other".',
    ),
)
METRICS = {metric.name: metric for metric in _ROWS}


def metric_of(name: str, labels: dict[str, str]) -> Metric:
    """The row of a metric.

    Raises: `ValueError` if the table has no such metric with these labels.
    """
    metric = METRICS.get(name)
    if metric is None:
        raise ValueError(f"metric {name} is not in fleetgate/ipc/metrics_table.py; add a row for it")
    if labels.keys() != set(metric.labels):
        raise ValueError(f"metric {name} has the labels {metric.labels}, not {tuple(labels)}")
    return metric


def other_labels(labels: dict[str, str]) -> dict[str, str]:
    """The same labels with "other" in place of every resource's name, so that the values are from fixed lists only."""
    return {name: "other" if name in _RESOURCE_LABELS else value for name, value in labels.items()}
