"""How long silence is borne: never shorter than a fault needs to be told from a pause, never longer than the bounds."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.patience import (
    FIRST_MAX_S,
    FIRST_MIN_S,
    FIRST_UNKNOWN_S,
    SEEN_MIN,
    STALL_GAPS,
    STALL_MAX_S,
    STALL_MIN_S,
    STALL_TOKENS,
    STALL_UNKNOWN_S,
    Pulse,
    first_event_s,
)

tpots_s = st.floats(0.001, 5.0)


@given(st.floats(0, 1000))
def test_a_first_event_has_three_times_what_was_predicted(predicted_s: float) -> None:
    limit_s = first_event_s(predicted_s)
    assert FIRST_MIN_S <= limit_s <= FIRST_MAX_S
    assert limit_s >= min(FIRST_MAX_S, 3.0 * predicted_s)
    assert first_event_s(None) == FIRST_UNKNOWN_S


@given(st.lists(tpots_s, max_size=200))
def test_a_stall_is_long_beside_what_was_seen_lately(seen_s: list[float]) -> None:
    pulse = Pulse()
    for tpot_s in seen_s:
        pulse.saw_stream(tpot_s)
    assert STALL_MIN_S <= pulse.stall_s <= STALL_MAX_S
    slowest_s = max(seen_s[-20:], default=0.0)
    assert pulse.stall_s >= min(STALL_MAX_S, 0.8 * STALL_TOKENS * slowest_s)
    if len(seen_s) < SEEN_MIN:
        assert pulse.stall_s >= STALL_UNKNOWN_S


@given(st.floats(1.5, 100.0))
def test_a_silence_that_it_came_back_from_is_no_stall(silent_s: float) -> None:
    pulse = Pulse()
    for _ in range(SEEN_MIN):
        pulse.saw_stream(0.02)
    assert pulse.stall_s == STALL_MIN_S
    pulse.saw_gap(silent_s)
    assert pulse.stall_s >= min(STALL_MAX_S, STALL_GAPS * silent_s)
    for _ in range(1000):
        pulse.saw_stream(0.02)
    assert pulse.stall_s == STALL_MIN_S, "what was long ago is forgotten"
