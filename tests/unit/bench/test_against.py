"""The comparison of two versions' costs: the ratio and its interval."""

import pytest
from bench.against import compare
from hypothesis import given
from hypothesis import strategies as st

costs = st.lists(st.floats(1.0, 1000.0), min_size=2, max_size=60)


@given(costs, st.floats(0.5, 2.0))
def test_a_constant_factor_is_found_whatever_the_noise_that_both_share(before: list[float], factor: float) -> None:
    found = compare(before, [cost * factor for cost in before])
    assert found.ratio == pytest.approx(factor)
    assert found.low == pytest.approx(factor)
    assert found.high == pytest.approx(factor)


@given(costs, st.data())
def test_the_interval_holds_the_ratio_and_swapping_the_sides_inverts_it(
    before: list[float], data: st.DataObject
) -> None:
    now = data.draw(st.lists(st.floats(1.0, 1000.0), min_size=len(before), max_size=len(before)))
    there, back = compare(before, now), compare(now, before)
    assert there.low <= there.ratio <= there.high
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert back.low == pytest.approx(1 / there.high)


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        compare([1.0], [1.0])
