"""The board's named integers, read as what they mean: counters and histograms with labels."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

from fleetgate.ipc.shared_memory import BUCKET_FIRST_BIT, BUCKET_LAST_BIT, bucket_bound

_NAME = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?", re.DOTALL)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_UNESCAPED = {"n": "\n", "\\": "\\", '"': '"'}
Labels = tuple[tuple[str, str], ...]
# Workers keep only the buckets that something fell into. Readers of a scrape interpolate from the bucket below, so
# every one of them is told.
BOUNDS_S = tuple(float(bucket_bound(bit)) for bit in range(BUCKET_FIRST_BIT, BUCKET_LAST_BIT + 1))


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
        answer = []
        for bound in sorted({*BOUNDS_S, *self.counts, math.inf}):
            total += self.counts.get(bound, 0)
            answer.append((bound, total))
        return answer

    def quantile_s(self, share: float) -> float | None:
        """The value that so many lie under, by straight lines inside a bucket; None without observations."""
        wanted = share * self.count
        if not self.count:
            return None
        below, lower = 0, 0.0
        for bound, total in self.cumulated():
            if total >= wanted and total > below:
                if bound == math.inf:
                    return max(lower, self.sum_s / self.count)  # beyond the last bound only the mean tells more
                return lower + (bound - lower) * (wanted - below) / (total - below)
            below, lower = total, bound if bound != math.inf else lower
        return lower


class MetricSeries(msgspec.Struct):
    """Every series of the board, by metric name and labels."""

    counters: dict[str, dict[Labels, int]]
    histograms: dict[str, dict[Labels, HistogramSeries]]

    def histogram(self, metric: str, **labels: str) -> HistogramSeries:
        """All histograms of a metric with these labels, added up."""
        merged = HistogramSeries({})
        for found, histogram in self.histograms.get(metric, {}).items():
            if labels.items() <= dict(found).items():
                merged.sum_s += histogram.sum_s
                for bound, count in histogram.counts.items():
                    merged.counts[bound] = merged.counts.get(bound, 0) + count
        return merged

    def counts_by(self, metric: str, label: str, **labels: str) -> dict[str, int]:
        """A counter added up for each value of one label."""
        answer: dict[str, int] = {}
        for found, value in self.counters.get(metric, {}).items():
            given = dict(found)
            if labels.items() <= given.items() and label in given:
                answer[given[label]] = answer.get(given[label], 0) + value
        return answer


def read_series(totals: Mapping[str, int]) -> MetricSeries:
    """Sort the board's totals into counters and histograms."""
    series = MetricSeries({}, {})
    for name, value in totals.items():
        metric, labels = parse_name(name)
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
def parse_name(name: str) -> tuple[str, Labels]:
    """An exposition name taken apart."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name, ()
    return match[1], tuple((label, _unescape(value)) for label, value in _labels(match[2] or ""))


def _labels(text: str) -> Iterable[tuple[str, str]]:
    return _LABEL.findall(text)


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: _UNESCAPED.get(match[1], match[1]), text)


def _histogram(series: MetricSeries, metric: str, labels: Labels) -> HistogramSeries:
    return series.histograms.setdefault(metric, {}).setdefault(labels, HistogramSeries({}))
