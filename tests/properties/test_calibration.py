"""A calibration of an engine whose speeds are known gives them back, stays in its budget, and stops where it should."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fleetgate.core.capacity import calibration
from fleetgate.core.capacity import units as capacity
from fleetgate.core.capacity.calibration import RequestWave, SingleRequest, SweepBudget, SweepRound, SweepTargets
from fleetgate.core.model import Profile

SPEEDS = st.builds(
    Profile,
    name=st.just("true"),
    prefill_tokens_per_s=st.floats(800, 60_000),
    base_s=st.floats(0.004, 0.04),
    per_sequence_s=st.floats(0.0001, 0.002),
    batch_max=st.integers(2, 400),
)
NOISE = st.lists(st.floats(0.0, 0.01), min_size=40, max_size=40)


def single(profile: Profile, tokens: int, late_s: float) -> SingleRequest:
    return SingleRequest(tokens, 0.03 + tokens / profile.prefill_tokens_per_s + late_s)


def wave(profile: Profile, round_: SweepRound, noise: float) -> RequestWave:
    """What an engine with places for `batch_max` shows of a wave."""
    batch, ran = round_.concurrency, min(round_.concurrency, profile.batch_max)
    step_s = capacity.step_s(profile, ran) * (1 + noise)
    prefill_s = batch * round_.prompt_tokens / profile.prefill_tokens_per_s
    return RequestWave(
        batch=batch,
        step_s=step_s,
        wave_s=(prefill_s + round_.output_tokens * step_s * batch / ran) * (1 + noise),
        prompt_tokens=round_.prompt_tokens,
        output_tokens=round_.output_tokens,
        ttft_s=prefill_s / 2,
        queued=batch > ran,
        running=ran,
    )


def sweep(profile: Profile, targets: SweepTargets, noise: list[float]) -> tuple[list[SingleRequest], list[RequestWave]]:
    singles: list[SingleRequest] = []
    waves: list[RequestWave] = []
    for round_, share in zip(calibration.plan(SweepBudget()), noise, strict=False):
        if round_.measures == "prefill":
            singles.append(single(profile, round_.prompt_tokens, share * 0.2))
        elif round_.measures == "decode" and not calibration.stop_reason(waves, targets):
            waves.append(wave(profile, round_, share))
    return singles, waves


@given(SPEEDS, NOISE)
def test_known_speeds_come_back(profile: Profile, noise: list[float]) -> None:
    targets = SweepTargets(tpot_s=0.1, ttft_s=10.0)
    found = calibration.measured_profile(*sweep(profile, targets, noise), targets)
    assert found.prefill_tokens_per_s == pytest.approx(profile.prefill_tokens_per_s, rel=0.05 + 2e-6 * 60_000)
    largest = [one for one in sweep(profile, targets, noise)[1] if not one.saturated][-1].batch
    for batch in (1, largest):
        predicted_s = found.base_s + found.per_sequence_s * batch
        assert predicted_s == pytest.approx(capacity.step_s(profile, batch), rel=0.05)


@given(SPEEDS)
def test_without_noise_knee_and_units_are_those_of_the_formula(profile: Profile) -> None:
    targets = SweepTargets(tpot_s=0.1, ttft_s=100.0)
    singles, waves = sweep(profile, targets, [0.0] * 40)
    found = calibration.measured_profile(singles, waves, targets)
    assert found.base_s == pytest.approx(profile.base_s, rel=1e-6)
    assert found.per_sequence_s == pytest.approx(profile.per_sequence_s, rel=1e-4)
    assert found.prefill_tokens_per_s == pytest.approx(profile.prefill_tokens_per_s, rel=1e-6)
    assume(found.units)
    assume(waves[0].tpot_s * capacity.IDLE_STEP_FACTOR <= targets.tpot_s)
    if waves[-1].tpot_s > targets.tpot_s and not waves[-1].saturated:
        free = Profile(
            name="free",
            prefill_tokens_per_s=profile.prefill_tokens_per_s,
            base_s=profile.base_s,
            per_sequence_s=profile.per_sequence_s,
            batch_max=100_000,
        )
        assert found.units == pytest.approx(capacity.units_of(free, targets.tpot_s), rel=0.01)
        own_prefill = found.units * 1000 / profile.prefill_tokens_per_s  # the wave counts it as part of its TPOT
        assert found.concurrency == pytest.approx(capacity.knee_of(free, targets.tpot_s), abs=1.1 + own_prefill)


@given(SPEEDS, NOISE)
def test_no_wave_follows_the_one_that_saturates(profile: Profile, noise: list[float]) -> None:
    targets = SweepTargets()
    _, waves = sweep(profile, targets, noise)
    assert [calibration.stop_reason(waves[:n], targets) for n in range(1, len(waves))] == [""] * (len(waves) - 1)
    assert sum(one.saturated for one in waves) <= 1
    if waves[-1].saturated:
        found = calibration.measured_profile([single(profile, 256, 0), single(profile, 512, 0)], waves, targets)
        assert found.batch_max == profile.batch_max
        assert 1 <= found.concurrency <= profile.batch_max


@given(SPEEDS, st.lists(st.floats(0.2, 5.0), min_size=3, max_size=3))
def test_a_few_late_answers_do_not_change_the_prefill_speed(profile: Profile, late_s: list[float]) -> None:
    sizes = [one.prompt_tokens for one in calibration.plan(SweepBudget()) if one.measures == "prefill"]
    delays = [0.0] * len(sizes)
    for at, seconds in zip((1, 7, 12), late_s, strict=True):
        delays[at] = seconds
    singles = [single(profile, tokens, seconds) for tokens, seconds in zip(sizes, delays, strict=True)]
    assert calibration.fit_prefill(singles) == pytest.approx(profile.prefill_tokens_per_s, rel=0.01)


@given(st.integers(1, 3000), st.integers(1, 2_000_000), st.integers(1, 16))
def test_a_plan_stays_in_its_budget_and_can_be_fitted(requests_max: int, tokens_max: int, engines: int) -> None:
    budget = SweepBudget(requests_max, tokens_max)
    try:
        rounds = calibration.plan(budget, engines)
    except calibration.BudgetTooSmall as refused:
        assert refused.minimum.requests_max > requests_max or refused.minimum.tokens_max > tokens_max
        assert calibration.plan(refused.minimum, engines)
        return
    assert sum(one.concurrency for one in rounds) <= requests_max
    assert sum(one.tokens for one in rounds) <= tokens_max
    assert len({one.prompt_tokens for one in rounds if one.measures == "prefill"}) >= 2
    waves = [one.concurrency for one in rounds if one.measures == "decode"]
    assert len(waves) >= 2
    assert waves == [engines * 2**n for n in range(len(waves))]


@given(st.floats(0.002, 0.1), st.integers(1, 12), st.integers(20, 60), st.integers(1, 3))
def test_a_step_is_timed_while_all_decode(step_s: float, streams: int, events: int, tokens_per_event: int) -> None:
    """Each begins one step after the one before it and is three times faster while others still prefill."""
    moments = []
    for stream in range(streams):
        alone = [stream * step_s + n * step_s / 3 for n in range(3 * (streams - 1 - stream))]
        together = [streams * step_s + n * step_s for n in range(events)]
        moments.append(alone + together)
    found = calibration.decode_step_s(moments, tokens_per_event)
    assert found == pytest.approx(step_s / tokens_per_event, rel=1e-6)


def test_what_cannot_be_told_is_said() -> None:
    with pytest.raises(calibration.MeasurementFailed, match="different length"):
        calibration.fit_prefill([SingleRequest(256, 0.1), SingleRequest(256, 0.2)])
    with pytest.raises(calibration.MeasurementFailed, match="long enough"):
        calibration.fit_decode([])
    assert calibration.decode_step_s([], 1.0) == calibration.decode_step_s([[1.0], [2.0, 3.0]], 1.0) == 0.0
