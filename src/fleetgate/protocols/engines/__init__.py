"""Engines: one file each. A file says where an engine tells its load and how to read it.

`METRICS_PATH`, `HEALTH_PATH` (both relative to the server's root, empty for "none") and `read(metrics) -> Signals`.
"""

import importlib
import pkgutil
import re
from functools import cache
from types import ModuleType

import msgspec

COUNT_MAX = 1e12  # an engine that says more, or +Inf, says nothing


class EngineSignals(msgspec.Struct, frozen=True):
    """What an engine says of its load; None where it does not say. Units: `kv_ratio` 0 to 1."""

    running: int | None = None
    waiting: int | None = None
    kv_ratio: float | None = None


@cache
def names() -> tuple[str, ...]:
    """Every engine whose load signals are read."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def find(engine: str) -> ModuleType | None:
    """The module of an engine, None for one without signals of its own (an opaque endpoint)."""
    name = engine.replace("-", "_")
    return importlib.import_module(f"{__name__}.{name}") if name in names() else None


def metric_sum(metrics: bytes, name: bytes) -> float | None:
    """The sum over all label sets of one metric in Prometheus text; None when it is not there.

    Cost: one search, whatever the size of the rest.
    """
    pattern = rb"(?:^|\n)" + re.escape(name) + rb"(?:\{[^\n]*\})? ([^ \n]+)"
    values = [value for match in re.findall(pattern, metrics) if abs(value := _number(match)) < COUNT_MAX]
    return sum(values) if values else None


def _number(text: bytes) -> float:
    """NaN, which is less than nothing, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
