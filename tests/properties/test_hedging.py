"""When a second attempt is due: only for what is slow for its size, and only where there is room to spare."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.health.hedge_policy import (
    SEEN_MIN,
    SLOW_QUANTILE,
    UTILISATION_MAX,
    HedgeThreshold,
    has_spare_capacity,
    may_hedge,
)
from fleetgate.core.routing.strategies import CandidateState

times_s = st.floats(0.001, 200.0)


@given(st.lists(times_s, min_size=SEEN_MIN, max_size=400), st.integers(1, 100_000))
def test_few_are_slower_than_what_is_slow(seen_s: list[float], prompt_tokens: int) -> None:
    table = HedgeThreshold()
    for ttft_s in seen_s:
        table.record(prompt_tokens, ttft_s)
    slow_s = table.threshold_s(prompt_tokens)
    assert sum(ttft_s > slow_s for ttft_s in seen_s) <= (1.0 - SLOW_QUANTILE) * len(seen_s) + 1
    assert slow_s <= 2.1 * max(seen_s), "a cell is no wider than a factor of two"
    assert table.threshold_s(prompt_tokens * 4) == float("inf"), "other sizes tell nothing of this one"


@given(st.lists(times_s, max_size=SEEN_MIN - 1))
def test_nothing_is_slow_before_enough_was_seen(seen_s: list[float]) -> None:
    table = HedgeThreshold()
    for ttft_s in seen_s:
        table.record(100, ttft_s)
    assert table.threshold_s(100) == float("inf")


def test_it_follows_engines_that_became_slower() -> None:
    table = HedgeThreshold()
    for _ in range(5000):
        table.record(100, 0.01)
    fast_s = table.threshold_s(100)
    for _ in range(5000):
        table.record(100, 1.0)
    assert table.threshold_s(100) > 20 * fast_s


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.sampled_from([0.0, 0.5, 1.0])), max_size=6))
def test_room_to_spare_is_counted_where_it_is(places: list[tuple[int, int, float]]) -> None:
    standings = [CandidateState(in_flight, health, limit) for in_flight, limit, health in places]
    up = [(in_flight, limit) for in_flight, limit, health in places if limit and health]
    used, there = sum(in_flight for in_flight, _ in up), sum(limit for _, limit in up)
    assert has_spare_capacity(standings) == (there > 0 and used < UTILISATION_MAX * there)
    assert not has_spare_capacity([*standings, CandidateState(0, 1.0, paused=True)]), "its engine is full"


def test_who_is_hedged() -> None:
    assert [may_hedge("critical", one) for one in Priority] == [one is Priority.CRITICAL for one in Priority]
    assert all(may_hedge("all", one) for one in Priority) and not any(may_hedge("off", one) for one in Priority)
