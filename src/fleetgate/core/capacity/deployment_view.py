"""What a proxy knows of a Deployment: computed at every tick, read by every request."""

from typing import NamedTuple

import msgspec

from fleetgate.core.capacity.latency_model import CurrentProfile, SpeedFactor
from fleetgate.core.capacity.units import REFERENCE_OUTPUT_TOKENS, output_token_s, tpot_target_s
from fleetgate.core.model import Profile, Slo

# Prompts that an engine prefills while it decodes lengthen the steps of all its sequences. A long response averages
# that out; a response of this length does not, so the share of prompts is bounded over the life of such a response.
SHORT_ANSWER_TOKENS = 18.0
# The largest share of an empty batch's prefill time that a request's own prompt counts for. Without it a long prompt
# would have room only in an idle replica, and under load there is none.
OWN_HEADROOM_MAX = 0.6


class EndpointCapacity(NamedTuple):
    """One Endpoint that is up, and the engines behind it; a proxy with a lease counts its part of them."""

    endpoint_slot: int
    engines: float = 1.0


class DeploymentView(msgspec.Struct, frozen=True):
    """What a proxy knows of a Deployment between two ticks.

    Units: `health` 0 to 1, breaker times slow start; `limit` in requests, 0 for none; `external_in_flight` are requests
    at the engine that did not come through this machine; `units` in CU; `slots` are the limit or, without one, a guess
    that is only used to compare loads.
    Shape: `paused` is set while the engine asks for no requests.
    """

    health: float
    limit: int = 0
    external_in_flight: int = 0
    endpoints: tuple[EndpointCapacity, ...] = ()
    units: float = 1.0
    current_profile: CurrentProfile | None = None
    slots: int = 0
    paused: bool = False


class Corrections(NamedTuple):
    """What was learned of a Deployment. Units: `margin` is the share of the TPOT target that may be used."""

    speed: SpeedFactor
    margin: float


def current_profile(profile: Profile, slo: Slo, corrections: Corrections, rtt_s: float) -> CurrentProfile:
    """A Profile at the learned speed, with the targets of an SLO less a margin."""
    speed, margin = corrections
    target_s = tpot_target_s(profile, slo.tpot_s)
    return CurrentProfile(
        profile=profile,
        prompt_token_s=speed.prefill / profile.prefill_tokens_per_s,
        base_s=profile.base_s * speed.decode,
        per_sequence_s=profile.per_sequence_s * speed.decode,
        tpot_max_s=margin * target_s,
        kv_tokens=float(profile.kv_tokens) or float("inf"),
        batch_max=float(profile.batch_max),
        window_s=SHORT_ANSWER_TOKENS * target_s,
        own_share_max=OWN_HEADROOM_MAX * max(0.0, 1.0 - profile.base_s * speed.decode / (margin * target_s)),
        rtt_s=rtt_s,
        sequence_s=0.5 * REFERENCE_OUTPUT_TOKENS * output_token_s(profile, slo.tpot_s) * speed.decode,
    )
