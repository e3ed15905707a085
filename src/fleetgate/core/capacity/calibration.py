"""Calibration: what a sweep sends, when it stops, and the Profile that follows from its measurements.

A sweep has two parts. Single requests with longer and longer prompts measure the prefill speed. Waves of 1, 2, 4, 8 …
requests that start together measure the decode step against the batch and, by the duration of a wave, the knee: a wave
of `b` requests with `o` output tokens takes `b · prompt / prefill + o · step(b)`. So `wave / o` is the TPOT of `b`
requests that are always in flight, and `b / wave` is the rate at which they end.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from statistics import fmean, median

import msgspec

from fleetgate.core.capacity.units import IDLE_STEP_FACTOR, cost_units, step_s
from fleetgate.core.model import Profile

# Half the reference request: the same knee at half the cost.
WAVE_PROMPT_TOKENS, WAVE_OUTPUT_TOKENS = 500, 100
PREFILL_PROMPT_TOKENS = (256, 512, 1024, 2048, 4096)
PREFILL_REPEATS = 3
PREFILL_OUTPUT_TOKENS = 4  # some engines hold the first token back until more follow
PREFILL_TOKENS_SHARE = 0.25  # of the token budget; the waves need the rest
WAVE_MAX = 512  # of one engine; no known engine gains throughput above it within an SLO
GAIN_MIN = 0.05
PREFILL_TOKENS_PER_S_MAX = 1e6  # a faster prefill cannot be measured against the noise
BASE_S_MIN = 1e-6
WAITED_PREFILLS = 2.0  # decode steps lengthen the prefill of a wave, but less than twofold
SPAN_EVENTS = 8  # a step is measured over so many, because a single arrival measures the network as much as the engine


class SweepBudget(msgspec.Struct, frozen=True):
    """The most that a sweep may send."""

    requests_max: int = 600
    tokens_max: int = 400_000


class SweepTargets(msgspec.Struct, frozen=True):
    """The latency targets that a wave must keep."""

    tpot_s: float = 0.05
    ttft_s: float = 2.0


class SweepRound(msgspec.Struct, frozen=True):
    """Requests that start together. Shape: `measures` is warm-up, prefill or decode."""

    measures: str
    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and output tokens of all its requests."""
        return self.concurrency * (self.prompt_tokens + self.output_tokens)


class BudgetTooSmall(Exception):
    """The budget is too small for two prompt sizes and two waves. Shape: `minimum` is the least that is enough."""

    def __init__(self, minimum: SweepBudget) -> None:
        super().__init__(f"at least {minimum.requests_max} requests and {minimum.tokens_max} tokens are needed")
        self.minimum = minimum


class MeasurementFailed(Exception):
    """There are too few measurements for a Profile; the text says which are missing."""


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(budget: SweepBudget, engines: int = 1) -> tuple[SweepRound, ...]:
    """All rounds of a sweep that nothing stops earlier; never more than the budget.

    Raises: `BudgetTooSmall` if the budget is below `minimum_budget`.
    """
    minimum = minimum_budget(engines)
    if budget.requests_max < minimum.requests_max or budget.tokens_max < minimum.tokens_max:
        raise BudgetTooSmall(minimum)
    rounds = list(_prefills(2))
    first_waves = list(_waves(engines))[:2]
    spare = SweepBudget(
        budget.requests_max - sum(one.concurrency for one in first_waves), budget.tokens_max - _tokens(first_waves)
    )
    for sizes in range(3, len(PREFILL_PROMPT_TOKENS) + 1):
        longer = list(_prefills(sizes))
        tokens_max = min(spare.tokens_max, PREFILL_TOKENS_SHARE * budget.tokens_max)
        if _tokens(longer) <= tokens_max and len(longer) <= spare.requests_max:
            rounds = longer
    requests, tokens = len(rounds), _tokens(rounds)
    for wave in _waves(engines):
        requests, tokens = requests + wave.concurrency, tokens + wave.tokens
        if requests > budget.requests_max or tokens > budget.tokens_max:
            break
        rounds.append(wave)
    return tuple(rounds)


def minimum_budget(engines: int = 1) -> SweepBudget:
    """The budget for two prompt sizes and two waves."""
    rounds = [*_prefills(2), *list(_waves(engines))[:2]]
    return SweepBudget(sum(one.concurrency for one in rounds), _tokens(rounds))


def expected_s(rounds: Iterable[SweepRound], profile: Profile, engines: int = 1) -> float:
    """About how many seconds rounds take on engines with this Profile."""
    return sum(
        one.concurrency / engines * one.prompt_tokens / profile.prefill_tokens_per_s
        + one.output_tokens * step_s(profile, one.concurrency / engines)
        for one in rounds
    )


def _prefills(sizes: int) -> Iterator[SweepRound]:
    yield SweepRound("warm-up", 1, PREFILL_PROMPT_TOKENS[0], PREFILL_OUTPUT_TOKENS)
    for prompt_tokens in PREFILL_PROMPT_TOKENS[:sizes]:
        for _ in range(PREFILL_REPEATS):
            yield SweepRound("prefill", 1, prompt_tokens, PREFILL_OUTPUT_TOKENS)


def _waves(engines: int) -> Iterator[SweepRound]:
    batch = 1
    while batch <= WAVE_MAX:
        yield SweepRound("decode", batch * engines, WAVE_PROMPT_TOKENS, WAVE_OUTPUT_TOKENS)
        batch *= 2


def _tokens(rounds: Iterable[SweepRound]) -> int:
    return sum(one.tokens for one in rounds)


# --- measurements -----------------------------------------------------------------------------------------------------


class SingleRequest(msgspec.Struct, frozen=True):
    """A request that was alone in the engine."""

    uncached_tokens: float
    ttft_s: float


class RequestWave(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that started together, as one engine saw them.

    Units: `batch` in requests of one engine; `step_s` while all of them decoded, 0 if they never did; `wave_s` from the
    first request sent to the last token; `ttft_s` is the median; `running` is the most requests that the engine
    reported as running, 0 if it reports none.
    """

    batch: float
    step_s: float
    wave_s: float
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    queued: bool = False
    refused: int = 0
    running: float = 0.0

    @property
    def tpot_s(self) -> float:
        """The TPOT of so many requests that are always in flight, prefills included."""
        return self.wave_s / self.output_tokens

    @property
    def requests_per_s(self) -> float:
        """How many requests end per second while so many are always in flight."""
        return self.batch / self.wave_s

    @property
    def saturated(self) -> bool:
        """Whether the engine could not run all requests at once."""
        return self.queued or self.refused > 0


def decode_step_s(streams: Sequence[Sequence[float]], tokens_per_event: float) -> float:
    """Seconds of a decode step while all streams decoded, 0 if that was too short to measure.

    Shape: `streams` has the times of each stream's content events, in order.
    """
    if not streams or not all(streams):
        return 0.0
    begin_s, end_s = max(moments[0] for moments in streams), min(moments[-1] for moments in streams)
    spans = []
    for moments in streams:
        inside = [at_s for at_s in moments if begin_s <= at_s <= end_s]
        spans += [
            (last_s - first_s) / SPAN_EVENTS
            for first_s, last_s in zip(inside, inside[SPAN_EVENTS:], strict=False)  # the second is shorter by a span
        ]
    return median(spans) / max(tokens_per_event, 1e-9) if spans else 0.0


def concurrent_streams(streams: Sequence[Sequence[float]], sent_s: float, prefill_s: float) -> int:
    """How many streams the engine ran at once: all, or those that began before the first of them ended.

    Units: `prefill_s` is the time for all prompts; if no stream waited much longer than that, none was queued.
    """
    if not streams or not all(streams):
        return 0
    last_begin_s, first_end_s = max(moments[0] for moments in streams), min(moments[-1] for moments in streams)
    if last_begin_s < first_end_s or last_begin_s - sent_s < WAITED_PREFILLS * prefill_s:
        return len(streams)
    return sum(moments[0] < first_end_s for moments in streams)


def stop_reason(waves: Sequence[RequestWave], targets: SweepTargets) -> str:
    """Why the sweep stops, as the end of a sentence; empty while a larger wave can still show more."""
    if not waves:
        return ""
    first, last = waves[0], waves[-1]
    if last.refused:
        return f"the engine refused {last.refused} of {last.batch:g} requests at once"
    if last.queued:
        return f"the engine queued some of {last.batch:g} requests"
    tpot_s = max(targets.tpot_s, IDLE_STEP_FACTOR * first.tpot_s)
    if last.tpot_s > tpot_s:
        return f"{last.batch:g} requests at once have a TPOT of {last.tpot_s:.3f} s, over the {tpot_s:.3f} s allowed"
    ttft_s = max(targets.ttft_s, IDLE_STEP_FACTOR * first.ttft_s)
    if last.ttft_s > ttft_s:
        return f"{last.batch:g} requests at once have a TTFT of {last.ttft_s:.2f} s, over the {ttft_s:.2f} s allowed"
    if len(waves) > 1 and last.requests_per_s < (1.0 + GAIN_MIN) * waves[-2].requests_per_s:
        return f"{last.batch:g} requests at once end no faster than {waves[-2].batch:g}"
    return ""


# --- the Profile ------------------------------------------------------------------------------------------------------


class MeasuredProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a sweep for one engine. Shape: a 0 could not be measured and is derived from the rest."""

    prefill_tokens_per_s: float
    base_s: float
    per_sequence_s: float
    batch_max: int = 0
    concurrency: int = 0
    units: float = 0.0


def measured_profile(
    singles: Sequence[SingleRequest], waves: Sequence[RequestWave], targets: SweepTargets
) -> MeasuredProfile:
    """The Profile that follows from the measurements.

    Raises: `MeasurementFailed` if there are too few.
    """
    prefill_tokens_per_s = fit_prefill(singles)
    base_s, per_sequence_s = fit_decode(waves)
    profile = Profile(
        name="measured",
        prefill_tokens_per_s=prefill_tokens_per_s,
        base_s=base_s,
        per_sequence_s=per_sequence_s,
    )
    batch_max = int(_batch_max(waves))
    knee = _knee(waves, targets)
    concurrency, units = 0, 0.0
    if knee:
        batch, requests_per_s = knee
        concurrency = max(1, int(batch))
        shape = waves[-1]
        each = cost_units(profile, targets.tpot_s, shape.prompt_tokens, shape.output_tokens)
        units = requests_per_s * each
    return MeasuredProfile(
        prefill_tokens_per_s=prefill_tokens_per_s,
        base_s=base_s,
        per_sequence_s=per_sequence_s,
        batch_max=batch_max,
        concurrency=concurrency,
        units=units,
    )


def fit_prefill(singles: Sequence[SingleRequest]) -> float:
    """Prompt tokens per second, from `TTFT = fixed + tokens / speed`.

    Raises: `MeasurementFailed` without two prompts of different length.
    Source: Theil-Sen, the median slope over all pairs, weighed by distance, so that a few late responses do not matter.
    """
    slopes = sorted(
        ((far.ttft_s - near.ttft_s) / (far.uncached_tokens - near.uncached_tokens), weight)
        for near, far in combinations(singles, 2)
        if (weight := abs(far.uncached_tokens - near.uncached_tokens)) >= 64
    )
    if not slopes:
        raise MeasurementFailed("no two prompts of different length got a response")
    half, passed = sum(weight for _, weight in slopes) / 2, 0.0
    slope = slopes[-1][0]
    for one, weight in slopes:
        passed += weight
        if passed >= half:
            slope = one
            break
    return 1.0 / max(slope, 1.0 / PREFILL_TOKENS_PER_S_MAX)


def fit_decode(waves: Sequence[RequestWave]) -> tuple[float, float]:
    """The fixed seconds of a decode step and those for each sequence, by least squares over unsaturated waves.

    Raises: `MeasurementFailed` if no wave has a step time.
    """
    seen = [(wave.batch, wave.step_s) for wave in waves if wave.step_s > 0.0 and not wave.saturated]
    if not seen:
        raise MeasurementFailed("no response was long enough to measure the time between its tokens")
    mean_batch, mean_s = fmean(batch for batch, _ in seen), fmean(seconds for _, seconds in seen)
    spread = sum((batch - mean_batch) ** 2 for batch, _ in seen)
    slope = sum((batch - mean_batch) * (seconds - mean_s) for batch, seconds in seen) / spread if spread else 0.0
    base_s = mean_s - slope * mean_batch
    if slope <= 0.0:  # noise: more work does not shorten a step
        return mean_s, 0.0
    if base_s < BASE_S_MIN:
        return BASE_S_MIN, sum(batch * seconds for batch, seconds in seen) / sum(batch**2 for batch, _ in seen)
    return base_s, slope


def _batch_max(waves: Sequence[RequestWave]) -> float:
    """How many requests the engine runs at once, 0 if no wave was saturated."""
    full = next((wave for wave in waves if wave.saturated), None)
    if full is None:
        return 0.0
    ran = max((wave.batch for wave in waves if not wave.saturated), default=1.0)
    took = full.running or full.batch - full.refused
    return min(full.batch, max(ran, took, 1.0))


def _knee(waves: Sequence[RequestWave], targets: SweepTargets) -> tuple[float, float] | None:
    """The largest batch within the TPOT target and its requests per second; None if no wave was too large.

    Between waves, and from the last good one up to the engine's batch size, `tpot_s` is taken as linear.
    """
    good = [wave for wave in waves if not wave.saturated]
    if not good:
        return None
    target_s = max(targets.tpot_s, IDLE_STEP_FACTOR * good[0].tpot_s)
    for near, far in pairwise(good):
        if far.tpot_s > target_s:
            return _at(_crossing(near, far, target_s), near, far)
    batch_max = _batch_max(waves)
    if batch_max:
        if len(good) == 1:
            return good[0].batch, good[0].requests_per_s
        near, far = good[-2:]
        batch = min(batch_max, _crossing(near, far, target_s)) if far.tpot_s > near.tpot_s else batch_max
        return _at(batch, near, far)
    if stop_reason(waves, targets):
        best = max(good, key=lambda wave: wave.requests_per_s * (wave.ttft_s <= targets.ttft_s or wave is good[0]))
        return best.batch, best.requests_per_s
    return None


def _crossing(near: RequestWave, far: RequestWave, tpot_s: float) -> float:
    """The batch at which the line through two waves reaches a TPOT."""
    return near.batch + (far.batch - near.batch) * (tpot_s - near.tpot_s) / (far.tpot_s - near.tpot_s)


def _at(batch: float, near: RequestWave, far: RequestWave) -> tuple[float, float]:
    """The batch and its requests per second."""
    tpot_s = near.tpot_s + (far.tpot_s - near.tpot_s) * (batch - near.batch) / (far.batch - near.batch)
    return batch, batch / (tpot_s * far.output_tokens)
