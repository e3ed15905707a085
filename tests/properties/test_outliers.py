"""Who does worse than it should: shares of results, slowness beside one's own past, regions that fall as a whole."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.health.outlier_detection import (
    BASELINE_SAMPLES,
    RESULTS_MIN,
    SLOW_SAMPLES,
    LatencyOutlier,
    ResultCounts,
    is_region_lost,
)

paces_s = st.floats(0.002, 0.5)


def learned(usual_s: float, in_flight: int = 10) -> LatencyOutlier:
    slowness = LatencyOutlier()
    for _ in range(BASELINE_SAMPLES):
        slowness.record(usual_s)
        assert not slowness.evaluate(in_flight)
    return slowness


def looks(slowness: LatencyOutlier, took_s: float, times: int, in_flight: int = 10) -> list[bool]:
    found = []
    for _ in range(times):
        slowness.record(took_s)
        found.append(slowness.evaluate(in_flight))
    return found


@given(paces_s)
def test_a_brownout_is_seen_within_a_few_looks(usual_s: float) -> None:
    found = looks(learned(usual_s), 10.0 * usual_s, 10)
    assert found.index(True) == SLOW_SAMPLES - 1
    assert sum(found) <= 10 // SLOW_SAMPLES, "told once, not at every look"


@given(paces_s, st.lists(st.floats(0.3, 3.0), max_size=60))
def test_ordinary_ups_and_downs_are_none(usual_s: float, factors: list[float]) -> None:
    slowness = learned(usual_s)
    assert not any(look for factor in factors for look in looks(slowness, factor * usual_s, 1))


def test_nothing_is_slow_before_it_is_known_what_is_usual_nor_where_nothing_comes_by() -> None:
    slowness = LatencyOutlier()
    assert not any(looks(slowness, 5.0, BASELINE_SAMPLES))
    assert not any(slowness.evaluate(10) for _ in range(100))


def test_who_has_much_more_to_do_is_busy_and_not_slow() -> None:
    assert not any(looks(learned(0.02, in_flight=10), 0.3, 20, in_flight=60))
    assert any(looks(learned(0.02, in_flight=10), 0.3, 20, in_flight=12))


def test_what_stays_slow_becomes_usual() -> None:
    slowness = learned(0.02)
    looks(slowness, 0.2, 3000)
    assert not any(looks(slowness, 0.2, 30))


@given(st.lists(st.booleans(), max_size=80))
def test_mostly_broke_is_more_than_half_of_enough(broken: list[bool]) -> None:
    results = ResultCounts()
    for number, bad in enumerate(broken):
        results = results.plus(number * 0.1, bad)
    assert results.ended == len(broken) and results.broken == sum(broken)
    assert results.mostly_broke == (len(broken) >= RESULTS_MIN and sum(broken) * 2 > len(broken))


def test_a_lost_region_is_told_from_chance() -> None:
    assert is_region_lost({"a": 10.0, "b": 11.5}, 3, 12.0)
    assert not is_region_lost({"a": 10.0, "b": 12.0}, 3, 12.5), "too far apart"
    assert not is_region_lost({"a": 12.0}, 1, 12.0), "one is one"
    assert not is_region_lost({"a": 12.0, "b": 12.0}, 50, 12.0), "two of fifty are two of fifty"
