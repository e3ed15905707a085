"""The table of metrics: complete, well-formed, and the only source of names."""

import ast
import itertools
import re

import pytest

from fleetgate.ipc.metrics_table import BOUNDS_US, METRICS, OCTAVE_PARTS, Kind, metric_of, step_of
from tests.test_tidy import SOURCE

NOT_OURS = re.compile(r"fleetgate_(engine_(client_disconnects|refusals)_total|demo\w*)")  # the simulated engine's own


def names_in_source() -> set[str]:
    """Every string of the source that is a metric's name, without the table's own."""
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.name != "metrics_table.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.update(re.findall(r"\bfleetgate_[a-z_]+(?=\{|$)", node.value))
    return {name for name in found if not NOT_OURS.fullmatch(name)}


def test_every_row_is_used_and_every_used_name_has_a_row() -> None:
    made = {metric.name for metric in METRICS.values() if not metric.copy_of}
    used = names_in_source()
    assert not made - used, "rows of the table that no code makes"
    assert {name for name in used if name.endswith(("_total", "_seconds", "_bytes"))} <= made, "names without a row"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_rows_are_well_formed(metric: object) -> None:
    assert isinstance(metric, tuple)
    row = METRICS[metric[0]]
    assert re.fullmatch(r"(fleetgate|gen_ai)_[a-z_]+", row.name)
    assert row.name.endswith("_total") is (row.kind is Kind.COUNTER)
    assert not row.unit or row.family.endswith(f"_{row.unit}")
    assert row.help.endswith(".") and "\n" not in row.help and "|" not in row.help
    assert not row.copy_of or METRICS[row.copy_of].labels == row.labels


def test_a_metric_that_is_not_in_the_table_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="add a row"):
        metric_of("fleetgate_surprises_total", {})
    with pytest.raises(ValueError, match="gateway"):
        metric_of("fleetgate_unavailable_total", {"gateway": "g", "deployment": "d"})


def test_buckets_are_found_by_the_highest_bits() -> None:
    edges = {value + more for bound in BOUNDS_US for value in (bound, 1 << bound.bit_length()) for more in (-1, 0, 1)}
    for value in sorted({0, 1, 63, 64, 127, 128, 255, 256, *edges, 1 << 40}):
        step = step_of(value.bit_length(), OCTAVE_PARTS[(value << 7) >> value.bit_length()])
        assert step == sum(bound <= value for bound in BOUNDS_US)


def test_bounds_are_less_than_20_percent_apart() -> None:
    assert all(lower < upper < lower * 1.2 for lower, upper in itertools.pairwise(BOUNDS_US))
    assert {1 << bit for bit in range(9, 29)} <= set(BOUNDS_US), "those of the last version"
