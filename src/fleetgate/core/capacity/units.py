"""What a Deployment takes and how much of it is free, in units that unlike GPUs can be compared by.

One capacity unit (CU) is one reference request a second within the SLO: 1,000 prompt tokens, none of them cached, and
200 output tokens. Source of the formulas: ALGORITHMS.md section 8.1.
"""

from fleetgate.core.model import Profile, Slo

REFERENCE_PROMPT_TOKENS = 1000
REFERENCE_OUTPUT_TOKENS = 200
KNEE_SHARE = 0.9  # of the concurrency at the knee: past it a few more requests cost everybody their SLO
# An engine that misses the TPOT target all by itself is measured against this many of its own lonely steps instead:
# nothing is refused for slowness alone, and it still has to be compared with others.
IDLE_STEP_FACTOR = 1.5

# An Endpoint back from ejection starts at a hundredth of its weight and has all of it after this long, so that a cold
# cache does not meet a full load. FAULTS.md row 60
SLOW_START_S = 30.0
SLOW_START_MIN = 0.01


def step_s(profile: Profile, batch: float) -> float:
    """Seconds of one decode step with so many sequences in it."""
    return profile.base_s + profile.per_sequence_s * batch


def tpot_target_s(profile: Profile, tpot_s: float) -> float:
    """The TPOT a replica is held to: the promised one, or what it can do at all where that is slower."""
    return max(tpot_s, IDLE_STEP_FACTOR * step_s(profile, 1))


def batch_within(profile: Profile, tpot_s: float) -> float:
    """The largest batch whose steps keep the TPOT target and whose KV fits, at the reference shape; at least 1."""
    batch = sequences_max_of(profile)
    if profile.per_sequence_s > 0.0:
        batch = min(batch, (tpot_target_s(profile, tpot_s) - profile.base_s) / profile.per_sequence_s)
    return max(1.0, batch)


def units_of(profile: Profile, tpot_s: float) -> float:
    """The CU of one replica: as measured, or from its speeds.

    Source: `(1 − base / tpot) / (1000 / prefill + 200 · per_sequence)`: at steps of just `tpot`, what `base` leaves of
    the time goes to prefill and to sequences. Bounded by the places in the batch and by the KV cache.
    """
    if profile.units > 0.0:
        return profile.units
    target_s = tpot_target_s(profile, tpot_s)
    prompt_s = REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s
    by_time = (1.0 - profile.base_s / target_s) / (prompt_s + REFERENCE_OUTPUT_TOKENS * profile.per_sequence_s)
    return min(by_time, rate_at(profile, sequences_max_of(profile)))


def sequences_max_of(profile: Profile) -> float:
    """Reference requests that a replica holds at once: places in the batch, or what fits into the KV cache."""
    if not profile.kv_tokens:
        return float(profile.batch_max)
    return max(1.0, min(profile.batch_max, profile.kv_tokens / (REFERENCE_PROMPT_TOKENS + REFERENCE_OUTPUT_TOKENS)))


def rate_at(profile: Profile, batch: float) -> float:
    """Reference requests a second of a replica that always decodes so many sequences, whatever their TPOT."""
    prompt_s = REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s
    return 1.0 / (prompt_s + REFERENCE_OUTPUT_TOKENS * step_s(profile, batch) / batch)


def knee_of(profile: Profile, tpot_s: float) -> float:
    """Requests in flight in one replica at the goodput knee: as measured, or by Little's law from its CU."""
    if profile.concurrency:
        return float(profile.concurrency)
    decode_s = REFERENCE_OUTPUT_TOKENS * tpot_target_s(profile, tpot_s)
    return units_of(profile, tpot_s) * (decode_s + REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s)


def limit_of(profile: Profile, tpot_s: float, engines: int) -> int:
    """The concurrency limit that follows from a Profile: 0.9 of the knee, at least one request a replica."""
    return max(engines, int(KNEE_SHARE * knee_of(profile, tpot_s) * engines))


def output_token_s(profile: Profile, tpot_s: float) -> float:
    """Replica-seconds that one output token takes at the largest batch within the SLO."""
    batch = batch_within(profile, tpot_s)
    return step_s(profile, batch) / batch


def work_s(profile: Profile, tpot_s: float, uncached_tokens: float, output_tokens: float) -> float:
    """Replica-seconds that a request takes; cached prompt tokens are free."""
    return uncached_tokens / profile.prefill_tokens_per_s + output_tokens * output_token_s(profile, tpot_s)


def cost_units(profile: Profile, tpot_s: float, uncached_tokens: float, output_tokens: float) -> float:
    """What a request costs in CU; the reference request costs 1."""
    reference_s = work_s(profile, tpot_s, REFERENCE_PROMPT_TOKENS, REFERENCE_OUTPUT_TOKENS)
    return work_s(profile, tpot_s, uncached_tokens, output_tokens) / reference_s


def output_weight(profile: Profile, tpot_s: float) -> float:
    """The token form of the CU: how many prompt tokens one output token weighs. It belongs to model, SKU and engine."""
    return output_token_s(profile, tpot_s) * profile.prefill_tokens_per_s


def tokens_per_unit(profile: Profile, tpot_s: float) -> float:
    """The prompt tokens, each output token weighed as `output_weight`, of one CU."""
    return REFERENCE_PROMPT_TOKENS + REFERENCE_OUTPUT_TOKENS * output_weight(profile, tpot_s)


def ttft_target_s(slo: Slo, prompt_tokens: float, fastest_idle_s: float = 0.0) -> float:
    """The TTFT a request is promised: longer for long prompts, and never what the fastest idle replica cannot do.

    Units: `fastest_idle_s` is the time to first token of the fastest candidate when it has nothing else to do.
    """
    return max(slo.ttft_s + prompt_tokens * slo.ttft_s_per_1k_tokens / 1000.0, IDLE_STEP_FACTOR * fastest_idle_s)


def slow_start(since_recovery_s: float) -> float:
    """The share of its weight that a Deployment may have so long after it came back, 0.01 to 1."""
    return min(1.0, max(SLOW_START_MIN, since_recovery_s / SLOW_START_S))


def available_units(health: float, units: float, in_flight: int, limit: int) -> float:
    """Free capacity in CU: `health × units × (1 − in flight / limit)`, never negative.

    Shape: `health` is breaker times slow start, 0 to 1; a limit of 0 means none, and then the load takes nothing away.
    """
    if limit <= 0:
        return health * units
    return health * units * max(0.0, 1.0 - in_flight / limit)


def normalised_load(units: float, in_flight: int) -> float:
    """Requests in flight per CU, counting the one that is about to join: how unlike Deployments compare when full."""
    return (in_flight + 1) / units


def spill_limit(limit: int, overflow_at: float) -> int:
    """The in-flight count at which a rank counts as full; a limit of 1 counts as 1, and 0 stays "no limit"."""
    if limit <= 1:
        return limit
    return max(1, int(limit * overflow_at))
