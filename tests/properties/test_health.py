"""The circuit breaker: what opens it, what closes it, and that it always gets another chance."""

from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.core.health import (
    BROKEN_IN_A_ROW,
    EJECTION_FIRST_S,
    EJECTION_MAX_S,
    HEALTHY,
    Breaker,
    Health,
    Sign,
    after,
    current,
    is_region_lost,
)

signs = st.lists(st.tuples(st.sampled_from(Sign), st.floats(0, 30)), max_size=40)


def play(events: list[tuple[Sign, float]]) -> tuple[Health, float]:
    health, now_s = HEALTHY, 0.0
    for sign, pause_s in events:
        now_s += pause_s
        health = after(health, sign, now_s)
    return health, now_s


@given(signs)
def test_a_breaker_always_gets_another_chance(events: list[tuple[Sign, float]]) -> None:
    health, now_s = play(events)
    later_s = now_s + EJECTION_MAX_S
    assert current(health, later_s) is not Breaker.OPEN
    closed = after(health, Sign.WENT_WELL, later_s)
    assert current(closed, later_s) is Breaker.CLOSED
    assert health.open_until_s <= now_s + EJECTION_MAX_S


@given(signs)
def test_probes_alone_never_close_an_open_breaker(events: list[tuple[Sign, float]]) -> None:
    """A probe proves the port, not the engine: traffic comes back through one real request."""
    health, now_s = play([*events, *[(Sign.BROKE, 0.0)] * BROKEN_IN_A_ROW])
    for _ in range(5):
        health = after(health, Sign.PROBE_WELL, now_s)
    assert current(health, now_s) is Breaker.HALF_OPEN


@given(st.integers(1, 12))
def test_each_ejection_in_a_row_lasts_longer_up_to_a_minute(times: int) -> None:
    health, now_s, last_s = HEALTHY, 0.0, 0.0
    for _ in range(BROKEN_IN_A_ROW):
        health = after(health, Sign.BROKE, now_s)
    for _ in range(times):
        pause_s = health.open_until_s - now_s
        assert EJECTION_FIRST_S <= pause_s <= EJECTION_MAX_S and pause_s >= last_s
        last_s, now_s = pause_s, health.open_until_s
        health = after(health, Sign.BROKE, now_s)


def test_success_in_between_keeps_it_closed() -> None:
    health, _ = play([(Sign.BROKE, 0.1), (Sign.BROKE, 0.1), (Sign.WENT_WELL, 0.1)] * 5)
    assert health.breaker is Breaker.CLOSED


def test_a_grey_failure_opens_it_although_some_get_through() -> None:
    """Two of three break, never three in a row: after twenty results it is out."""
    health, _ = play([(Sign.BROKE, 0.1), (Sign.BROKE, 0.1), (Sign.WENT_WELL, 0.1)] * 7)
    assert health.breaker is Breaker.OPEN


@given(st.lists(st.booleans(), min_size=60, max_size=60))
def test_what_mostly_works_stays_in(broken: list[bool]) -> None:
    """Of ten results at most three break, and never three in a row."""
    events: list[tuple[Sign, float]] = []
    for at in range(0, 60, 10):
        ten = broken[at : at + 10]
        chosen = [n for n, bad in enumerate(ten) if bad][:3]
        chosen = [n for n in chosen if not {n - 1, n - 2} <= set(chosen)]
        events += [(Sign.BROKE if n in chosen else Sign.WENT_WELL, 0.2) for n in range(10)]
    assume(not any(all(sign is Sign.BROKE for sign, _ in events[n : n + 3]) for n in range(58)))
    assert play(events)[0].breaker is Breaker.CLOSED


def test_what_broke_long_ago_is_forgotten() -> None:
    health, _ = play([(Sign.BROKE, 0.1), (Sign.WENT_WELL, 0.1), (Sign.WENT_WELL, 11.0)])
    assert health == HEALTHY


def test_a_lost_region_is_told_from_chance() -> None:
    assert is_region_lost({"a": 10.0, "b": 11.5}, 12.0)
    assert not is_region_lost({"a": 10.0, "b": 12.0}, 12.5)
    assert not is_region_lost({"a": 12.0}, 12.0)
    suspect = after(HEALTHY, Sign.REGION_LOST, 5.0)
    assert current(suspect, 5.0) is Breaker.HALF_OPEN
    assert current(after(suspect, Sign.WENT_WELL, 6.0), 6.0) is Breaker.CLOSED
    assert current(after(suspect, Sign.BROKE, 6.0), 6.0) is Breaker.OPEN
