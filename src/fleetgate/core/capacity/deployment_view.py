"""What a proxy knows of one Deployment between two looks: renewed by its sweep, read by every request."""

from typing import NamedTuple

import msgspec

from fleetgate.core.capacity.latency_model import CurrentProfile, SpeedFactor
from fleetgate.core.capacity.units import REFERENCE_OUTPUT_TOKENS, output_token_s, tpot_target_s
from fleetgate.core.model import Profile, Slo

# Prompts that an engine takes in while it decodes lengthen the steps of everybody in it. A long answer averages that
# out; one of this length does not, so it is over its life that the share of prompts is kept within bounds.
SHORT_ANSWER_TOKENS = 18.0
# Of the time that an empty batch leaves for prompts: a request's own may not count for all of it, or a long one would
# have room nowhere but in an idle replica, of which there are none under load.
OWN_HEADROOM_MAX = 0.6


class EndpointCapacity(NamedTuple):
    """One Endpoint that is up, and how many engines stand behind it; a proxy with a lease counts its part of them."""

    endpoint_slot: int
    engines: float = 1.0


class DeploymentView(msgspec.Struct, frozen=True):
    """What a proxy knows of a Deployment between two looks: renewed by its sweep, read by every request.

    Units: `health` 0 to 1, breaker times slow start; `limit` in requests, 0 for none; `foreign` requests that did not
    come through here; `units` in CU; `places` are the limit or, while there is none, a guess that only weighs.
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
    """What was learned of a Deployment.

    Units: `margin` of the TPOT target that may be used.
    """

    speed: SpeedFactor
    margin: float


def current_profile(profile: Profile, slo: Slo, lessons: Corrections, rtt_s: float) -> CurrentProfile:
    """A Profile as it is now, held to an SLO less a margin."""
    pace, margin = lessons
    target_s = tpot_target_s(profile, slo.tpot_s)
    return CurrentProfile(
        profile=profile,
        prompt_token_s=pace.prefill / profile.prefill_tokens_per_s,
        base_s=profile.base_s * pace.decode,
        per_sequence_s=profile.per_sequence_s * pace.decode,
        tpot_max_s=margin * target_s,
        kv_tokens=float(profile.kv_tokens) or float("inf"),
        batch_max=float(profile.batch_max),
        window_s=SHORT_ANSWER_TOKENS * target_s,
        own_share_max=OWN_HEADROOM_MAX * max(0.0, 1.0 - profile.base_s * pace.decode / (margin * target_s)),
        rtt_s=rtt_s,
        sequence_s=0.5 * REFERENCE_OUTPUT_TOKENS * output_token_s(profile, slo.tpot_s) * pace.decode,
    )
