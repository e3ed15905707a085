"""How long silence is borne: never shorter than a fault needs to be told from a pause, never longer than the bounds."""

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.health.timeouts import (
    FIRST_ALIVE_S,
    FIRST_FACTOR,
    FIRST_MAX_S,
    FIRST_MIN_S,
    FIRST_UNKNOWN_S,
    STALL_GAPS,
    STALL_MAX_S,
    STALL_MIN_S,
    STALL_TOKENS,
    STALL_UNKNOWN_S,
    STREAMS_MIN,
    WHOLE_MAX_S,
    WHOLE_MIN_S,
    FirstTokenTimes,
    StreamTiming,
    first_event_s,
    whole_answer_s,
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
    pulse = StreamTiming()
    for tpot_s in seen_s:
        pulse.record_stream(tpot_s)
    assert STALL_MIN_S <= pulse.stall_s <= STALL_MAX_S
    slowest_s = max(seen_s[-20:], default=0.0)
    assert pulse.stall_s >= min(STALL_MAX_S, 0.8 * STALL_TOKENS * slowest_s)
    if len(seen_s) < STREAMS_MIN:
        assert pulse.stall_s >= STALL_UNKNOWN_S


@given(st.lists(tpots_s, max_size=100), st.lists(tpots_s, max_size=60), st.integers(0, 100_000))
def test_a_whole_answer_has_three_times_what_its_longest_form_would_take(
    wholes_s: list[float], streams_s: list[float], tokens_max: int
) -> None:
    pulse = StreamTiming()
    for token_s in streams_s:
        pulse.record_stream(token_s)
    for token_s in wholes_s:
        pulse.record_response(token_s)
    limit_s = whole_answer_s(None, pulse.token_s, tokens_max)
    assert WHOLE_MIN_S <= limit_s <= WHOLE_MAX_S
    known = wholes_s if len(wholes_s) >= STREAMS_MIN else streams_s if len(streams_s) >= STREAMS_MIN else []
    if not known or not tokens_max:
        assert limit_s == WHOLE_MAX_S
    else:
        assert limit_s >= min(WHOLE_MAX_S, 3.0 * 0.8 * max(known[-20:]) * tokens_max)


@given(st.floats(1.5, 100.0))
def test_a_silence_that_it_came_back_from_is_no_stall(silent_s: float) -> None:
    pulse = StreamTiming()
    for _ in range(STREAMS_MIN):
        pulse.record_stream(0.02)
    assert pulse.stall_s == STALL_MIN_S
    pulse.record_gap(silent_s)
    assert pulse.stall_s >= min(STALL_MAX_S, STALL_GAPS * silent_s)
    for _ in range(1000):
        pulse.record_stream(0.02)
    assert pulse.stall_s == STALL_MIN_S, "what was long ago is forgotten"


sizes = st.integers(100, 10_000_000)


@given(st.lists(st.tuples(sizes, st.floats(0.01, 20.0)), min_size=STREAMS_MIN, max_size=80), sizes)
def test_what_was_seen_of_first_tokens_bounds_what_is_expected(seen: list[tuple[int, float]], size: int) -> None:
    """Never less than the slowest lately of its own size; larger requests have longer, smaller ones no less."""
    firsts = FirstTokenTimes()
    for body_bytes, ttft_s in seen[: STREAMS_MIN - 1]:
        firsts.record(body_bytes, ttft_s, 0.0)
    assert firsts.expected_s(size) is None, "too few tell nothing"
    for body_bytes, ttft_s in seen[STREAMS_MIN - 1 :]:
        firsts.record(body_bytes, ttft_s, 0.0)
    expected_s = firsts.expected_s(size)
    assert expected_s is not None and expected_s >= min(ttft_s for _, ttft_s in seen)
    alike = [ttft_s for body_bytes, ttft_s in seen[-20:] if body_bytes.bit_length() == size.bit_length()]
    if alike:
        assert expected_s >= 0.8 * max(alike)
    elif all(body_bytes.bit_length() < size.bit_length() for body_bytes, _ in seen):
        nearest = max(body_bytes.bit_length() for body_bytes, _ in seen)
        same_s = firsts.expected_s(1 << (nearest - 1))
        assert same_s is not None and expected_s >= 2.0 ** (size.bit_length() - nearest) * same_s


@given(st.floats(1.0, 100.0))
def test_who_waits_while_others_are_served_makes_all_more_patient(waited_s: float) -> None:
    """A queue inside an engine is not its death; nobody served for a while may be."""
    firsts = FirstTokenTimes()
    for _ in range(STREAMS_MIN):
        firsts.record(1000, 0.1, 0.0)
    firsts.record_waiting(1000, waited_s, FIRST_ALIVE_S + 0.1)
    assert firsts.expected_s(1000) == 0.1
    firsts.record_waiting(1000, waited_s, FIRST_ALIVE_S)
    assert firsts.expected_s(1000) == max(0.1, waited_s)
    assert first_event_s(firsts.expected_s(1000)) >= min(FIRST_MAX_S, FIRST_FACTOR * waited_s)
