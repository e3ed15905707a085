"""Has a replica room for this request? By prediction, not by counting: TTFT and TPOT as they would come out.

An engine with chunked prefill shares its steps: each decodes one token of every running sequence and prefills up to a
chunk of the oldest waiting prompts. So a prompt waits for the prompt tokens ahead of it and its own, in chunks that
each carry a decode step along.
"""

from math import ceil
from typing import NamedTuple

import msgspec

from fleetgate.core.admission.work_ledger import TokenWork
from fleetgate.core.model import Profile

CHUNK_TOKENS = 2048  # what vLLM and SGLang prefill in one step by default
PROMPTS_SHARE_MAX = 0.95  # past it a prediction would run away
OUTPUT_WEIGHT = 8.0  # prompt tokens that one output token weighs; measured on A100s and H100s: 8 to 12


class SpeedFactor(NamedTuple):
    """How much slower (above 1) or faster than its Profile an engine is now; learned from its streams."""

    prefill: float = 1.0
    decode: float = 1.0


NOMINAL_SPEED = SpeedFactor()


class RequestShape(NamedTuple):
    """What a request needs, as far as can be known before it is answered.

    Units: `ttft_left_s` is what is left of its TTFT target, infinite where nothing was promised.
    Shape: `warm_slot` is the Endpoint that has seen the first `warm_tokens` of this prompt, -1 for none.
    """

    prompt_tokens: float
    output_tokens: float
    ttft_left_s: float = float("inf")
    warm_slot: int = -1
    warm_tokens: float = 0.0

    @property
    def units(self) -> float:
        """Its price's measure where Deployments differ only in price: about what it costs in CU anywhere."""
        return (self.prompt_tokens + OUTPUT_WEIGHT * self.output_tokens) / (1000.0 + OUTPUT_WEIGHT * 200.0)

    def uncached_at(self, endpoint_slot: int) -> float:
        """Prompt tokens that this Endpoint has to compute; the last one always is, for it yields the answer."""
        if endpoint_slot != self.warm_slot:
            return self.prompt_tokens
        return max(1.0, self.prompt_tokens - self.warm_tokens)


class LatencyPrediction(msgspec.Struct, frozen=True, gc=False):
    """How a request would do at one Endpoint. `late` is empty where it would keep its SLO, else it says why not.

    `tight` is where it would keep it at the cost of those who are there: its long prompt holds up their answers.
    Units: `prefill_s` is the part of `ttft_s` that prompts take, its own and those ahead of it, `ahead_s` the latter.
    """

    endpoint_slot: int
    ttft_s: float
    tpot_s: float
    prefill_s: float
    ahead_s: float = 0.0
    late: str = ""
    delays_others: bool = False


class CurrentProfile(msgspec.Struct, frozen=True, gc=False):
    """A Profile as it is now: at the pace that streams have shown, and held to an SLO less a margin.

    Units: `prompt_token_s` of one prompt token, `base_s` and `per_sequence_s` of a decode step; `window_s` is the
    life of a short answer, over which prompts that are sent meanwhile lengthen its steps; `own_share_max` is how
    much of that a request's own prompt may count for; `sequence_s` what a request in flight still takes of the replica.
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


def idle_ttft_s(speed: CurrentProfile, prompt_tokens: float) -> float:
    """TTFT of a replica that has nothing else to do."""
    return speed.rtt_s + prompt_tokens * speed.prompt_token_s


def predict(
    need: RequestShape, speed: CurrentProfile, endpoint_slot: int, engines: float, work: TokenWork
) -> LatencyPrediction:
    """Predict TTFT and TPOT of a request at one Endpoint.

    Cost: 0.8 µs. Source: ALGORITHMS.md section 9; the TPOT is the step at the batch it would join, stretched by the
    share of a short answer's life that prompts have been taking lately, its own among them.
    """
    pending, sequences, kv_tokens, recent = work
    if engines != 1.0:
        pending, sequences = pending / engines, sequences / engines
        kv_tokens, recent = kv_tokens / engines, recent / engines
    prompt_tokens, output_tokens, ttft_left_s, warm_slot, _ = need
    own = prompt_tokens if endpoint_slot != warm_slot else need.uncached_at(endpoint_slot)
    ahead = pending + own
    token_s = speed.prompt_token_s
    prefill_s = ahead * token_s
    ttft_s = speed.rtt_s + prefill_s
    decode_s = speed.base_s + speed.per_sequence_s * (sequences + 1.0)
    # Its own prompt lengthens the steps of others only, and a long one has to be taken some time and somewhere.
    share_per_token = token_s / speed.window_s
    own_share = own * share_per_token
    tight = False
    if own_share > speed.own_share_max:
        stretch = 1.0 - min(PROMPTS_SHARE_MAX, recent * share_per_token + own_share)
        tight = sequences >= 1.0 and decode_s > speed.tpot_max_s * stretch
        own_share = speed.own_share_max
    prompts_share = recent * share_per_token + own_share
    tpot_s = decode_s / (1.0 - min(PROMPTS_SHARE_MAX, prompts_share))
    late = ""
    if sequences >= 1.0:
        # Half a step more: the one under way has to end before the prompt is looked at.
        ttft_s += (ceil(ahead / CHUNK_TOKENS) + 0.5) * (decode_s - speed.per_sequence_s)
        if tpot_s > speed.tpot_max_s:  # alone it cannot be faster anywhere in this Deployment, so only then
            late = "TPOT"
        elif kv_tokens + prompt_tokens + output_tokens > speed.kv_tokens:
            late = "KV cache"
        elif sequences >= speed.batch_max:
            late = "batch"
    if ttft_s > ttft_left_s:
        late = "TTFT"
    return LatencyPrediction(endpoint_slot, ttft_s, tpot_s, prefill_s, pending * token_s, late, tight)
