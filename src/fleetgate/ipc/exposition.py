"""Metrics read from shared memory, and the text of `/metrics` in the formats of Prometheus and OpenMetrics."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec

from fleetgate.ipc.metrics_table import BOUNDS_US, METRICS, Kind, Metric, bound_label

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_ESCAPED = {"n": "\n", "\\": "\\", '"': '"'}
Labels = tuple[tuple[str, str], ...]
# Workers keep only the buckets that have observations. PromQL adds up buckets of equal bounds, so all are written.
BOUNDS_S = tuple(float(bound_label(step)) for step in range(len(BOUNDS_US)))


class Series(NamedTuple):
    """One metric series: the metric's name and its labels."""

    metric: str
    labels: dict[str, str]


def parse_series_name(name: str) -> Series:
    """The metric and the labels of a series name: the inverse of `series_name`.

    Raises: `ValueError` if the text is not a series name.
    Cost: 3 µs; a reader parses each name once.
    """
    metric, brace, rest = name.partition("{")
    labels: dict[str, str] = {}
    if not brace:
        return Series(metric, labels)
    at = 0
    while at < len(rest):
        end = rest.index('="', at)
        key, at = rest[at:end], end + 2
        value, at = _read_value(rest, at)
        labels[key] = value
        if rest[at : at + 1] == ",":
            at += 1
        elif rest[at:] == "}":
            return Series(metric, labels)
        else:
            break
    raise ValueError(f"series name {name!r} does not end in a closing brace")


def _read_value(text: str, at: int) -> tuple[str, int]:
    """A label value that starts at `at`, unescaped, and the position after its closing quote."""
    parts = []
    while True:
        end = text.index('"', at)
        escape = text.find("\\", at, end)
        if escape < 0:
            parts.append(text[at:end])
            return "".join(parts), end + 1
        parts.append(text[at:escape])
        parts.append(_ESCAPED.get(text[escape + 1], text[escape + 1]))
        at = escape + 2


def series_name(name: str, labels: dict[str, str]) -> str:
    """The exposition name. Label values come from resources and enums, never from a request."""
    if not labels:
        return name
    parts = (f'{key}="{_escape(value, True)}"' for key, value in labels.items())
    return f"{name}{{{','.join(parts)}}}"


class HistogramSeries(msgspec.Struct):
    """Counts by upper bound, each bucket's own; `sum_s` in seconds."""

    counts: dict[float, int]
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        """Observations."""
        return sum(self.counts.values())

    def cumulated(self) -> list[tuple[float, int]]:
        """Observations up to each bound, the last bound infinite."""
        total = 0
        cumulated = []
        for bound in sorted({*BOUNDS_S, *self.counts, math.inf}):
            total += self.counts.get(bound, 0)
            cumulated.append((bound, total))
        return cumulated

    def quantile_s(self, share: float) -> float | None:
        """The quantile, interpolated linearly inside its bucket; None without observations."""
        wanted = share * self.count
        if not self.count:
            return None
        below, lower = 0, 0.0
        for bound, total in self.cumulated():
            if total >= wanted and total > below:
                if bound == math.inf:
                    return max(lower, self.sum_s / self.count)  # above the last bound only the mean is known
                return lower + (bound - lower) * (wanted - below) / (total - below)
            below, lower = total, bound if bound != math.inf else lower
        return lower


class MetricSeries(msgspec.Struct):
    """Every series of the shared memory, by metric name and labels."""

    counters: dict[str, dict[Labels, int]]
    histograms: dict[str, dict[Labels, HistogramSeries]]

    def histogram(self, metric: str, **labels: str) -> HistogramSeries:
        """The sum of a metric's histograms that have these labels."""
        merged = HistogramSeries({})
        for found, histogram in self.histograms.get(metric, {}).items():
            if labels.items() <= dict(found).items():
                merged.sum_s += histogram.sum_s
                for bound, count in histogram.counts.items():
                    merged.counts[bound] = merged.counts.get(bound, 0) + count
        return merged

    def counts_by(self, metric: str, label: str, **labels: str) -> dict[str, int]:
        """A counter's sums for each value of one label."""
        sums: dict[str, int] = {}
        for found, value in self.counters.get(metric, {}).items():
            given = dict(found)
            if labels.items() <= given.items() and label in given:
                sums[given[label]] = sums.get(given[label], 0) + value
        return sums


def read_series(totals: Mapping[str, int]) -> MetricSeries:
    """Counters and histograms from the series of all workers."""
    series = MetricSeries({}, {})
    for name, value in totals.items():
        metric, labels = _parsed(name)
        if metric.endswith("_bucket"):
            bound = dict(labels).get("le", "+Inf")
            rest = tuple(pair for pair in labels if pair[0] != "le")
            _histogram(series, metric.removesuffix("_bucket"), rest).counts[float(bound)] = value
        elif metric.endswith("_seconds_sum"):
            _histogram(series, metric.removesuffix("_sum"), labels).sum_s = value / 1e6
        else:
            series.counters.setdefault(metric, {})[labels] = value
    return series


@lru_cache(maxsize=65_536)
def _parsed(name: str) -> tuple[str, Labels]:
    try:
        series = parse_series_name(name)
    except ValueError:  # not ours
        return name, ()
    return series.metric, tuple(series.labels.items())


def _histogram(series: MetricSeries, metric: str, labels: Labels) -> HistogramSeries:
    return series.histograms.setdefault(metric, {}).setdefault(labels, HistogramSeries({}))


class Family:
    """The samples of one metric of the table."""

    def __init__(self, name: str) -> None:
        self.metric = METRICS[name]
        self.samples: list[tuple[Labels, float | HistogramSeries]] = []

    def add(self, values: Sequence[str], value: float) -> "Family":
        """Add a sample. Shape: `values` are those of the table's labels, in its order."""
        self.samples.append((tuple(zip(self.metric.labels, values, strict=True)), value))
        return self


def series_families(series: MetricSeries) -> Iterator[Family]:
    """The families of all counters and histograms that the workers keep, sorted by name.

    Series that the table does not have are left out: a worker of another version may have made them.
    """
    for metric in sorted(METRICS.values()):
        cells: Mapping[Labels, float | HistogramSeries]
        if metric.kind is Kind.HISTOGRAM:
            cells = series.histograms.get(metric.copy_of or metric.name, {})
        else:
            cells = series.counters.get(metric.name, {})
        if cells:
            family = Family(metric.name)
            family.samples += sorted(cells.items(), key=lambda cell: cell[0])
            yield family


def wants_openmetrics(accept: str) -> bool:
    """Whether an `Accept` header prefers OpenMetrics to the Prometheus text format."""
    weights = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for media_range in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in media_range.split(";"))
        if kind in weights:
            weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
            try:
                weights[kind] = max(weights[kind], float(weight))
            except ValueError:  # not a number: as if the client had not named this type
                continue
    openmetrics, text = weights.values()
    return openmetrics > 0 and openmetrics >= text


def exposition_text(families: Iterable[Family], openmetrics: bool) -> str:
    """The page of `/metrics` in OpenMetrics, or in the Prometheus text format."""
    lines: list[str] = []
    for family in families:
        metric = family.metric
        name = metric.family if openmetrics else metric.name
        lines.append(f"# HELP {name} {_escape(metric.help, openmetrics)}")
        lines.append(f"# TYPE {name} {metric.kind}")
        if openmetrics and metric.unit:
            lines.append(f"# UNIT {name} {metric.unit}")
        for labels, value in family.samples:
            if isinstance(value, HistogramSeries):
                lines += _histogram_lines(metric, labels, value)
            else:
                lines.append(f"{metric.name}{_braces(labels)} {_number(value)}")
    lines.append("# EOF\n" if openmetrics else "")
    return "\n".join(lines)


def _histogram_lines(metric: Metric, labels: Labels, histogram: HistogramSeries) -> Iterator[str]:
    name, total = metric.name, 0
    for bound, total in histogram.cumulated():
        yield f"{name}_bucket{_braces((*labels, ('le', _number(bound))))} {_number(total)}"
    yield f"{name}_count{_braces(labels)} {_number(total)}"
    yield f"{name}_sum{_braces(labels)} {_number(histogram.sum_s)}"


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value, True)}"' for name, value in sorted(labels)) + "}"


def _escape(text: str, quotes: bool) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(float(value))
