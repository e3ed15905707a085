"""When a Snapshot is to blame: rules over every course of counts, and the way of a trial through its stages."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.canary_analysis import (
    BASELINE_MIN,
    CANARY_S,
    FAILED_MIN,
    PROBATION_S,
    RETRY_MAX_S,
    RETURNED_S,
    RISE,
    TRANSITIONS,
    AttemptCounts,
    CanaryStage,
    CanaryTrial,
    is_worse,
    next_stage,
    retry_after_s,
)

NONE = AttemptCounts()
WELL = AttemptCounts(100, 0)


@st.composite
def results(draw: st.DrawFn) -> AttemptCounts:
    ended = draw(st.integers(0, 2000))
    return AttemptCounts(ended, draw(st.integers(0, ended)))


def look(before: AttemptCounts = WELL) -> CanaryTrial:
    return CanaryTrial(CanaryStage.LOOK, 0.0, before, before, NONE, NONE)


@given(results(), results(), results())
def test_nothing_is_given_up_that_does_no_worse_than_what_it_is_compared_with(
    since: AttemptCounts, before: AttemptCounts, others: AttemptCounts
) -> None:
    if is_worse(since, before, others):
        assert since.failed >= FAILED_MIN
        assert since.share > max(before.share, others.share) + RISE
        assert before.ended - before.failed >= BASELINE_MIN, "there was nothing to go back to"


@given(results(), results(), st.integers(FAILED_MIN, 2000))
def test_all_failing_after_nothing_failed_is_always_noticed(
    before: AttemptCounts, others: AttemptCounts, failed: int
) -> None:
    before, others = AttemptCounts(before.ended + BASELINE_MIN, 0), AttemptCounts(others.ended, 0)
    assert is_worse(AttemptCounts(failed, failed), before, others)


@given(results(), results(), results(), st.integers(0, 500))
def test_more_failures_never_clear_it(
    since: AttemptCounts, before: AttemptCounts, others: AttemptCounts, more: int
) -> None:
    if is_worse(since, before, others):
        assert is_worse(AttemptCounts(since.ended + more, since.failed + more), before, others)


@given(
    st.lists(st.tuples(st.floats(0.01, 40), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60)), max_size=60)
)
def test_a_trial_makes_legal_moves_only(course: list[tuple[float, int, int, int]]) -> None:
    trial, own, others, now_s = look(), NONE, NONE, 0.0
    for pause_s, good, bad, elsewhere in course:
        now_s += pause_s
        own = AttemptCounts(own.ended + good + bad, own.failed + bad)
        others = AttemptCounts(others.ended + elsewhere, others.failed)
        after = next_stage(trial, own, others, now_s)
        assert after.stage is trial.stage or after.stage in TRANSITIONS[trial.stage]
        trial = after


@given(results(), st.floats(PROBATION_S, 60))
def test_without_failures_every_snapshot_becomes_the_good_one(before: AttemptCounts, age_s: float) -> None:
    trial = next_stage(look(before), AttemptCounts(50, 0), NONE, CANARY_S)
    assert trial.stage is CanaryStage.PROBATION
    assert next_stage(trial, AttemptCounts(500, 0), NONE, age_s).stage is CanaryStage.GOOD


def test_what_fails_everywhere_is_not_blamed_on_the_change() -> None:
    """A region that dies in the same moment fails in the workers that have the old Snapshot too."""
    assert next_stage(look(), AttemptCounts(50, 45), AttemptCounts(50, 45), 0.1).stage is CanaryStage.LOOK
    assert next_stage(look(), AttemptCounts(50, 45), AttemptCounts(50, 0), 0.1).stage is CanaryStage.RETURNED


def returned() -> CanaryTrial:
    trial = next_stage(look(), AttemptCounts(50, 45), NONE, 1.0)
    assert trial.stage is CanaryStage.RETURNED and trial.bad == AttemptCounts(50, 45)
    return trial


def test_going_back_that_helps_is_followed_by_another_trial() -> None:
    trial = next_stage(returned(), AttemptCounts(150, 46), NONE, 1.0 + RETURNED_S)
    assert trial.stage is CanaryStage.WAITING
    waits_s = retry_after_s(trial.returns)
    assert next_stage(trial, AttemptCounts(150, 46), NONE, trial.since_s + waits_s - 0.1).stage is CanaryStage.WAITING
    again = next_stage(trial, AttemptCounts(150, 46), NONE, trial.since_s + waits_s)
    assert (again.stage, again.own) == (CanaryStage.LOOK, AttemptCounts(150, 46))


def test_going_back_that_does_not_help_clears_the_snapshot() -> None:
    assert next_stage(returned(), AttemptCounts(100, 90), NONE, 1.5).stage is CanaryStage.CLEARED


@given(st.integers(1, 40))
def test_each_return_waits_longer_up_to_a_bound(returns: int) -> None:
    assert retry_after_s(returns) <= retry_after_s(returns + 1) <= RETRY_MAX_S


def test_every_stage_has_its_row() -> None:
    assert set(TRANSITIONS) == set(CanaryStage)
    assert msgspec.structs.fields(CanaryTrial)[0].name == "stage"
