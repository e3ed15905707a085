"""Latency prediction: the TTFT and TPOT that a request would have at an Endpoint, and whether they keep the SLO.

An engine with chunked prefill shares its steps: each step decodes one token of every running sequence and prefills up
to a chunk of the oldest waiting prompts. So a prompt waits for the prompt tokens ahead of it and for its own, in chunks
that each include a decode step.
"""

from math import ceil
from typing import NamedTuple

import msgspec

from fleetgate.core.admission.work_ledger import TokenWork
from fleetgate.core.model import Profile

CHUNK_TOKENS = 2048  # the default prefill of one step in vLLM and SGLang
PROMPTS_SHARE_MAX = 0.95  # above it a prediction would grow without bound
OUTPUT_WEIGHT = 8.0  # prompt tokens that one output token weighs; measured on A100s and H100s: 8 to 12


class SpeedFactor(NamedTuple):
    """How much slower (above 1) or faster than its Profile an engine is now; learned from its streams."""

    prefill: float = 1.0
    decode: float = 1.0


NOMINAL_SPEED = SpeedFactor()


class RequestShape(NamedTuple):
    """The token counts of a request, as far as they are known before its response.

    Units: `ttft_left_s` is what is left of its TTFT target, infinite without a target.
    Shape: `warm_slot` is the Endpoint that saw the first `warm_tokens` of this prompt before, -1 for none.
    """

    prompt_tokens: float
    output_tokens: float
    ttft_left_s: float = float("inf")
    warm_slot: int = -1
    warm_tokens: float = 0.0

    @property
    def units(self) -> float:
        """About what the request costs in CU on any engine, to compare prices."""
        return (self.prompt_tokens + OUTPUT_WEIGHT * self.output_tokens) / (1000.0 + OUTPUT_WEIGHT * 200.0)

    def uncached_at(self, endpoint_slot: int) -> float:
        """Prompt tokens that this Endpoint must compute; at least the last one, which yields the output."""
        if endpoint_slot != self.warm_slot:
            return self.prompt_tokens
        return max(1.0, self.prompt_tokens - self.warm_tokens)


class LatencyPrediction(msgspec.Struct, frozen=True, gc=False):
    """The latency predicted for a request at one Endpoint.

    Units: `prefill_s` is the part of `ttft_s` for prompts, its own and those ahead of it; `ahead_s` is that for those
    ahead of it.
    Shape: `late` names the target that the request would miss, empty if none; `delays_others` says that its long prompt
    would make requests there miss their TPOT.
    """

    endpoint_slot: int
    ttft_s: float
    tpot_s: float
    prefill_s: float
    ahead_s: float = 0.0
    late: str = ""
    delays_others: bool = False

    @property
    def tight(self) -> bool:
        """Old name of `delays_others`, which installed strategy plug-ins still read."""
        return self.delays_others


class CurrentProfile(msgspec.Struct, frozen=True, gc=False):
    """A Profile at the speed learned from streams, with the targets of an SLO less a margin.

    Units: `prompt_token_s` is for one prompt token, `base_s` and `per_sequence_s` for a decode step; `window_s` is the
    life of a short response: prompts sent during it lengthen its steps; `own_share_max` is the most of it
    that a request's own prompt counts for; `sequence_s` is the replica time that a request in flight still takes.
    """

    profile: Profile
    prompt_token_s: float
    base_s: float
    per_sequence_s: float
    tpot_max_s: float
    kv_tokens: float
    batch_max: float
    window_s: float
    own_share_max: float
    rtt_s: float
    sequence_s: float


def idle_ttft_s(profile: CurrentProfile, prompt_tokens: float) -> float:
    """The TTFT of an idle replica."""
    return profile.rtt_s + prompt_tokens * profile.prompt_token_s


def predict(
    shape: RequestShape, profile: CurrentProfile, endpoint_slot: int, engines: float, work: TokenWork
) -> LatencyPrediction:
    """Predict TTFT and TPOT of a request at one Endpoint.

    The TPOT is the step at the batch that the request would join, stretched by the share of a short response's life
    that recent prompts take, its own among them.
    Cost: 0.8 µs.
    """
    pending, sequences, kv_tokens, recent = work
    if engines != 1.0:
        pending, sequences = pending / engines, sequences / engines
        kv_tokens, recent = kv_tokens / engines, recent / engines
    prompt_tokens, output_tokens, ttft_left_s, warm_slot, _ = shape
    own = prompt_tokens if endpoint_slot != warm_slot else shape.uncached_at(endpoint_slot)
    ahead = pending + own
    token_s = profile.prompt_token_s
    prefill_s = ahead * token_s
    ttft_s = profile.rtt_s + prefill_s
    decode_s = profile.base_s + profile.per_sequence_s * (sequences + 1.0)
    # A request's own prompt lengthens only the steps of others, and a long prompt has to run on some Endpoint.
    share_per_token = token_s / profile.window_s
    own_share = own * share_per_token
    delays_others = False
    if own_share > profile.own_share_max:
        stretch = 1.0 - min(PROMPTS_SHARE_MAX, recent * share_per_token + own_share)
        delays_others = sequences >= 1.0 and decode_s > profile.tpot_max_s * stretch
        own_share = profile.own_share_max
    prompts_share = recent * share_per_token + own_share
    tpot_s = decode_s / (1.0 - min(PROMPTS_SHARE_MAX, prompts_share))
    late = ""
    if sequences >= 1.0:
        # Half a step more: the current step has to end before the engine reads the prompt.
        ttft_s += (ceil(ahead / CHUNK_TOKENS) + 0.5) * (decode_s - profile.per_sequence_s)
        if tpot_s > profile.tpot_max_s:  # not for an idle replica: no replica of this Deployment is faster than that
            late = "TPOT"
        elif kv_tokens + prompt_tokens + output_tokens > profile.kv_tokens:
            late = "KV cache"
        elif sequences >= profile.batch_max:
            late = "batch"
    if ttft_s > ttft_left_s:
        late = "TTFT"
    return LatencyPrediction(endpoint_slot, ttft_s, tpot_s, prefill_s, pending * token_s, late, delays_others)
