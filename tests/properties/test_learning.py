"""What traffic teaches: it converges, stays in its bounds, and learns nothing from idle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.capacity.adaptive_limit import (
    MARGIN_MAX,
    MARGIN_MIN,
    AdaptiveLimit,
    EngineLoad,
    LimitBounds,
    ViolationCounts,
)
from fleetgate.core.capacity.latency_model import NOMINAL_SPEED, SpeedFactor
from fleetgate.core.capacity.speed_learning import SpeedLearner
from fleetgate.core.capacity.token_estimates import TokenEstimates

QUIET = EngineLoad()
COUNTS = st.builds(
    ViolationCounts,
    ended=st.integers(0, 400),
    ttft_late=st.integers(0, 400),
    tpot_late=st.integers(0, 400),
    refused=st.integers(0, 50),
)


@given(st.floats(0.5, 3.0), st.floats(0.05, 3.0))
def test_a_pace_is_found_within_a_few_dozen_first_tokens(slowness: float, prefill_s: float) -> None:
    learner = SpeedLearner(NOMINAL_SPEED)
    for _ in range(120):
        predicted_prefill_s = prefill_s * learner.factor.prefill
        learner.record_first_token(predicted_prefill_s + 0.03, prefill_s * slowness + 0.03, predicted_prefill_s)
    assert learner.factor.prefill == pytest.approx(slowness, rel=0.1)
    assert learner.factor.decode == 1.0


@given(st.floats(0.5, 3.0))
def test_a_silent_slow_down_of_decoding_is_believed_after_a_few_seconds(slowness: float) -> None:
    learner = SpeedLearner(NOMINAL_SPEED)
    for _ in range(12):
        learner.record_decode(1.0, 0.02, int(1.0 / (0.02 * slowness)))
    assert learner.factor.decode == pytest.approx(slowness, rel=0.12)


def test_a_short_prefill_or_a_few_steps_teach_nothing() -> None:
    learner = SpeedLearner(SpeedFactor(1.5, 1.5))
    learner.record_first_token(0.05, 5.0, 0.001)
    learner.record_decode(1.0, 0.02, 1)
    assert learner.factor == SpeedFactor(1.5, 1.5)


@given(st.lists(st.tuples(COUNTS, st.integers(0, 200), st.integers(0, 5)), max_size=40), st.booleans())
def test_a_limit_keeps_its_bounds_whatever_happens(
    seconds: list[tuple[ViolationCounts, int, int]], written: bool
) -> None:
    start, least, most = 40, 12, 40 if written else 60
    learner = AdaptiveLimit(LimitBounds(start, least, most, written))
    total, told = ViolationCounts(), start
    for now_s, (more, in_flight, waiting) in enumerate(seconds):
        total = ViolationCounts(
            total.ended + more.ended,
            total.ttft_late + more.ttft_late,
            total.tpot_late + more.tpot_late,
            total.refused + more.refused,
        )
        before = int(learner.limit)
        change = learner.update(total, in_flight, EngineLoad(waiting), float(now_s))
        assert least <= learner.limit <= most
        assert MARGIN_MIN <= learner.margin <= MARGIN_MAX
        if change is not None:
            assert change.because and change.before == told != change.after == int(learner.limit)
            told = change.after
        else:
            assert int(learner.limit) >= min(before, told), "one that falls below what was told is always told"
        if written and not more.refused and total.refused == 0:
            assert learner.limit == start, "lateness and queues never move what an operator wrote"


@given(st.integers(0, 30))
def test_nothing_is_learned_from_idle(in_flight: int) -> None:
    learner = AdaptiveLimit(LimitBounds(60, 10, 90))
    for now_s in range(20):
        assert learner.update(ViolationCounts(ended=now_s), in_flight, QUIET, float(now_s)) is None


def test_a_busy_deployment_without_trouble_gets_more() -> None:
    learner = AdaptiveLimit(LimitBounds(60, 10, 90))
    for now_s in range(5):
        learner.update(ViolationCounts(ended=20 * now_s), 55, QUIET, float(now_s))
    assert learner.limit == 65


def test_late_answers_narrow_the_margin_first_and_the_limit_when_that_is_spent() -> None:
    learner = AdaptiveLimit(LimitBounds(60, 10, 90))
    margins, limits = [], []
    for now_s in range(60):
        learner.update(ViolationCounts(ended=20 * now_s, tpot_late=6 * now_s), 55, QUIET, float(now_s))
        margins.append(learner.margin)
        limits.append(learner.limit)
    spent = margins.index(MARGIN_MIN)
    assert margins[:spent] == sorted(margins[:spent], reverse=True)
    assert min(limits[: spent - 1]) >= 60 and limits[-1] < 60


def test_refusals_lower_even_a_written_limit_and_it_comes_back() -> None:
    learner = AdaptiveLimit(LimitBounds(50, 1, 50, written=True))
    change = learner.update(ViolationCounts(ended=20, refused=0), 50, QUIET, 0.0)
    change = learner.update(ViolationCounts(ended=40, refused=5), 50, QUIET, 1.0)
    assert change is not None and "refused 5" in change.because
    for now_s in range(2, 40):
        learner.update(ViolationCounts(ended=40 + 20 * now_s, refused=5), 45, QUIET, float(now_s))
    assert learner.limit == 50


def test_an_unknown_engine_has_no_limit_until_it_shows_one() -> None:
    learner = AdaptiveLimit(LimitBounds(0, 1, 4096))
    for now_s in range(10):
        assert learner.update(ViolationCounts(ended=50 * now_s), 500, QUIET, float(now_s)) is None
    assert learner.limit == 0
    change = learner.update(ViolationCounts(ended=500, refused=50), 100, QUIET, 10.0)
    assert change is not None and change.before == 0 and learner.limit == 90
    for second in range(1, 13):
        learner.update(ViolationCounts(ended=500 + 100 * second, refused=50), 90, QUIET, 10.0 + second)
    assert learner.limit < 103, "then it creeps"


def test_requests_that_wait_in_an_engine_show_what_it_carries() -> None:
    learner = AdaptiveLimit(LimitBounds(0, 1, 4096))
    for now_s in range(4):
        learner.update(ViolationCounts(ended=50 * now_s), 64, EngineLoad(waiting=32), float(now_s))
    assert learner.limit == 32


@given(st.integers(0, 40), st.integers(3, 20))
def test_a_queue_in_the_engine_is_taken_off_at_once_and_a_stale_one_costs_a_tenth(waiting: int, idle: int) -> None:
    learner = AdaptiveLimit(LimitBounds(80, 1, 120))
    for now_s in range(3):
        learner.update(ViolationCounts(), 80, EngineLoad(waiting), float(now_s))
    assert learner.limit == (80 - waiting if 4 < waiting < 40 else pytest.approx(72 if waiting >= 40 else 83))
    learner = AdaptiveLimit(LimitBounds(80, 1, 120))
    for now_s in range(3):
        learner.update(ViolationCounts(), idle, EngineLoad(waiting=30), float(now_s))
    assert learner.limit == pytest.approx(72), "what was in flight is gone, so the two do not belong together"


@given(st.lists(st.integers(1, 4000), min_size=80, max_size=200), st.integers(1, 5000))
def test_lengths_follow_what_a_key_usually_gets(tokens: list[int], most: int) -> None:
    lengths = TokenEstimates()
    for count in tokens:
        lengths.record_output("m", "k", count)
    expected = lengths.output_tokens("m", "k")
    assert min(tokens) <= expected <= max(tokens)
    assert lengths.output_tokens("m", "k", most) <= most
    assert lengths.output_tokens("m", "another key") == pytest.approx(expected)


def test_tokens_per_byte_are_learned_from_usage() -> None:
    lengths = TokenEstimates()
    assert lengths.prompt_tokens("m", 4000) == 1000
    for _ in range(200):
        lengths.record_prompt("m", 4000, 1600)
    assert lengths.prompt_tokens("m", 8000) == pytest.approx(3200, rel=0.02)
