"""Capacity units: how much a Deployment can take and how much of it is free, comparable between unlike GPUs.

One capacity unit (CU) is one reference request per second within the SLO: 1,000 prompt tokens, none of them cached, and
200 output tokens.
"""

from fleetgate.core.model import Profile, Slo

REFERENCE_PROMPT_TOKENS = 1000
REFERENCE_OUTPUT_TOKENS = 200
KNEE_SHARE = 0.9  # of the concurrency at the knee: above it a few more requests make all of them miss the SLO
# An engine that misses the TPOT target even for a single sequence is held to this multiple of its own step for one
# sequence instead, so that it still serves requests and can be compared with other engines.
IDLE_STEP_FACTOR = 1.5

# An Endpoint that returns from ejection starts at a hundredth of its weight and has all of it after this long, so that
# a cold cache does not get full load. faults.md row 60
SLOW_START_S = 30.0
SLOW_START_MIN = 0.01


def step_s(profile: Profile, batch: float) -> float:
    """Seconds of one decode step at a batch size."""
    return profile.base_s + profile.per_sequence_s * batch


def tpot_target_s(profile: Profile, tpot_s: float) -> float:
    """The TPOT target of a replica: that of the SLO, or what the replica can reach if that is slower."""
    return max(tpot_s, IDLE_STEP_FACTOR * step_s(profile, 1))


def batch_within(profile: Profile, tpot_s: float) -> float:
    """The largest batch of reference requests that keeps the TPOT target and fits into the KV cache; at least 1."""
    batch = sequences_max_of(profile)
    if profile.per_sequence_s > 0.0:
        batch = min(batch, (tpot_target_s(profile, tpot_s) - profile.base_s) / profile.per_sequence_s)
    return max(1.0, batch)


def units_of(profile: Profile, tpot_s: float) -> float:
    """The CU of one replica: as measured, or from its speeds.

    Source: `(1 − base / tpot) / (1000 / prefill + 200 · per_sequence)`: at steps of `tpot`, the time that `base` leaves
    is for prefill and sequences. Bounded by the batch size and the KV cache.
    """
    if profile.units > 0.0:
        return profile.units
    target_s = tpot_target_s(profile, tpot_s)
    prompt_s = REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s
    by_time = (1.0 - profile.base_s / target_s) / (prompt_s + REFERENCE_OUTPUT_TOKENS * profile.per_sequence_s)
    return min(by_time, rate_at(profile, sequences_max_of(profile)))


def sequences_max_of(profile: Profile) -> float:
    """The most reference requests in one replica's batch: by its batch size, or by what fits into its KV cache."""
    if not profile.kv_tokens:
        return float(profile.batch_max)
    return max(1.0, min(profile.batch_max, profile.kv_tokens / (REFERENCE_PROMPT_TOKENS + REFERENCE_OUTPUT_TOKENS)))


def rate_at(profile: Profile, batch: float) -> float:
    """Reference requests per second of a replica that always decodes so many sequences, whatever their TPOT."""
    prompt_s = REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s
    return 1.0 / (prompt_s + REFERENCE_OUTPUT_TOKENS * step_s(profile, batch) / batch)


def knee_of(profile: Profile, tpot_s: float) -> float:
    """Requests in flight in one replica at the goodput knee: as measured, or by Little's law from its CU."""
    if profile.concurrency:
        return float(profile.concurrency)
    decode_s = REFERENCE_OUTPUT_TOKENS * tpot_target_s(profile, tpot_s)
    return units_of(profile, tpot_s) * (decode_s + REFERENCE_PROMPT_TOKENS / profile.prefill_tokens_per_s)


def limit_of(profile: Profile, tpot_s: float, engines: int) -> int:
    """The concurrency limit from a Profile: 0.9 of the knee, at least one request for each replica."""
    return max(engines, int(KNEE_SHARE * knee_of(profile, tpot_s) * engines))


def output_token_s(profile: Profile, tpot_s: float) -> float:
    """Replica-seconds of one output token at the largest batch within the SLO."""
    batch = batch_within(profile, tpot_s)
    return step_s(profile, batch) / batch


def work_s(profile: Profile, tpot_s: float, uncached_tokens: float, output_tokens: float) -> float:
    """Replica-seconds of a request; cached prompt tokens are free."""
    return uncached_tokens / profile.prefill_tokens_per_s + output_tokens * output_token_s(profile, tpot_s)


def cost_units(profile: Profile, tpot_s: float, uncached_tokens: float, output_tokens: float) -> float:
    """The cost of a request in CU; the reference request costs 1."""
    reference_s = work_s(profile, tpot_s, REFERENCE_PROMPT_TOKENS, REFERENCE_OUTPUT_TOKENS)
    return work_s(profile, tpot_s, uncached_tokens, output_tokens) / reference_s


def output_weight(profile: Profile, tpot_s: float) -> float:
    """How many prompt tokens one output token weighs; it depends on model, SKU and engine."""
    return output_token_s(profile, tpot_s) * profile.prefill_tokens_per_s


def tokens_per_unit(profile: Profile, tpot_s: float) -> float:
    """One CU in prompt tokens, with each output token weighed by `output_weight`."""
    return REFERENCE_PROMPT_TOKENS + REFERENCE_OUTPUT_TOKENS * output_weight(profile, tpot_s)


def ttft_target_s(slo: Slo, prompt_tokens: float, fastest_idle_s: float = 0.0) -> float:
    """The TTFT target of a request: longer for long prompts, and never below what the fastest idle replica can do.

    Units: `fastest_idle_s` is the TTFT of the fastest candidate if it were idle.
    """
    return max(slo.ttft_s + prompt_tokens * slo.ttft_s_per_1k_tokens / 1000.0, IDLE_STEP_FACTOR * fastest_idle_s)


def slow_start(since_recovery_s: float) -> float:
    """The share of its weight that an Endpoint has so long after its return, 0.01 to 1."""
    return min(1.0, max(SLOW_START_MIN, since_recovery_s / SLOW_START_S))


def available_units(health: float, units: float, in_flight: int, limit: int) -> float:
    """Free capacity in CU: `health × units × (1 − in flight / limit)`, never negative.

    Shape: `health` is breaker times slow start, 0 to 1; a limit of 0 means none, and then the load is not subtracted.
    """
    if limit <= 0:
        return health * units
    return health * units * max(0.0, 1.0 - in_flight / limit)


def normalised_load(units: float, in_flight: int) -> float:
    """Requests in flight per CU, the new one included: comparable between unlike Deployments when they are full."""
    return (in_flight + 1) / units


def spill_limit(limit: int, overflow_at: float) -> int:
    """The requests in flight at which a rank counts as full; a limit of 1 stays 1, and 0 stays "no limit"."""
    if limit <= 1:
        return limit
    return max(1, int(limit * overflow_at))
