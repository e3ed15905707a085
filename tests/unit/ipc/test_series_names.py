"""A series name read back gives the metric and the labels it was made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.ipc.exposition import Series, parse_series_name, series_name

METRICS = st.from_regex(r"[a-z_]{1,20}", fullmatch=True)
LABELS = st.dictionaries(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), st.text(max_size=20), max_size=4)


@given(METRICS, LABELS)
def test_a_series_name_is_read_back(metric: str, labels: dict[str, str]) -> None:
    assert parse_series_name(series_name(metric, labels)) == Series(metric, labels)


@pytest.mark.parametrize("name", ['a{b="c"', 'a{b="c', "a{b}", 'a{b="c"d="e"}', "a{"])
def test_what_is_not_a_series_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        parse_series_name(name)
