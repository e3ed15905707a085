"""Engines: one file each. A file defines where an engine reports its load, and how to parse the report.

It has `METRICS_PATH`, `HEALTH_PATH` (both relative to the server's root, empty for "none") and
`read(metrics) -> EngineSignals`.
"""

import importlib
import pkgutil
import re
from functools import cache
from types import ModuleType

import msgspec

COUNT_MAX = 1e12  # larger values, +Inf included, count as missing


class EngineSignals(msgspec.Struct, frozen=True):
    """The load that an engine reports, None for what it does not report. Units: `kv_ratio` 0 to 1."""

    running: int | None = None
    waiting: int | None = None
    kv_ratio: float | None = None


@cache
def names() -> tuple[str, ...]:
    """Every engine with a file in the folder, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def find(engine: str) -> ModuleType | None:
    """The module of an engine, None for one without a file (an opaque Endpoint)."""
    name = engine.replace("-", "_")
    return importlib.import_module(f"{__name__}.{name}") if name in names() else None


def metric_sum(metrics: bytes, name: bytes) -> float | None:
    """The sum over all label sets of one metric in Prometheus text; None without such a metric.

    Cost: one search over the text.
    """
    pattern = rb"(?:^|\n)" + re.escape(name) + rb"(?:\{[^\n]*\})? ([^ \n]+)"
    values = [value for match in re.findall(pattern, metrics) if abs(value := _number(match)) < COUNT_MAX]
    return sum(values) if values else None


def _number(text: bytes) -> float:
    """The number, NaN for other text; every comparison with NaN is false."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
