"""How the candidates stand for one request: what they have in flight, how fit they are, and how it would do at each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from fleetgate.core.books import Books
from fleetgate.core.capacity import REFERENCE_OUTPUT_TOKENS, output_token_s, tpot_target_s, ttft_target_s
from fleetgate.core.forecast import Fit, Need, Pace, Speed, fit, idle_ttft_s
from fleetgate.core.model import Profile, Slo
from fleetgate.core.strategies import Candidate, Load, Standing

# Prompts that an engine takes in while it decodes lengthen the steps of everybody in it. A long answer averages that
# out; one of this length does not, so it is over its life that the share of prompts is kept within bounds.
SHORT_ANSWER_TOKENS = 18.0
# Of the time that an empty batch leaves for prompts: a request's own may not count for all of it, or a long one would
# have room nowhere but in an idle replica, of which there are none under load.
OWN_HEADROOM_MAX = 0.6


class Seat(NamedTuple):
    """One Endpoint that is up, and how many engines stand behind it; a proxy with a lease counts its part of them."""

    endpoint_slot: int
    engines: float = 1.0


class Outlook(msgspec.Struct, frozen=True):
    """What a proxy knows of a Deployment between two looks: renewed by its sweep, read by every request.

    Units: `health` 0 to 1, breaker times slow start; `limit` in requests, 0 for none; `foreign` requests that did not
    come through here; `units` in CU; `places` are the limit or, while there is none, a guess that only weighs.
    """

    health: float
    limit: int = 0
    foreign: int = 0
    seats: tuple[Seat, ...] = ()
    units: float = 1.0
    speed: Speed | None = None
    places: int = 0


class Lessons(NamedTuple):
    """What was learned of a Deployment.

    Units: `margin` of the TPOT target that may be used.
    """

    pace: Pace
    margin: float


def speed_of(profile: Profile, slo: Slo, lessons: Lessons, rtt_s: float) -> Speed:
    """A Profile as it is now, held to an SLO less a margin."""
    pace, margin = lessons
    target_s = tpot_target_s(profile, slo.tpot_s)
    return Speed(
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


def target_s(need: Need, slo: Slo, candidates: Sequence[Candidate], outlooks: Mapping[int, Outlook]) -> float:
    """The TTFT a request is promised here; a target that no idle replica could meet is widened."""
    return ttft_target_s(slo, need.prompt_tokens, least_idle_s(need, candidates, outlooks))


def least_idle_s(need: Need, candidates: Sequence[Candidate], outlooks: Mapping[int, Outlook]) -> float:
    """The TTFT of the fastest candidate if it had nothing else to do, 0 where nothing is known."""
    least_s = float("inf")
    for candidate in candidates:
        speed = outlooks[candidate.slot].speed
        if speed is not None and (idle_s := idle_ttft_s(speed, need.prompt_tokens)) < least_s:
            least_s = idle_s
    return least_s if least_s < float("inf") else 0.0


def load_for(
    need: Need, candidates: Sequence[Candidate], outlooks: Mapping[int, Outlook], books: Books, now_s: float
) -> Load:
    """How each candidate stands for this request. Cost: 2.5 µs a candidate with a Profile, 0.4 µs without."""
    load = {}
    in_flight_of = books.ledger.in_flight
    for candidate in candidates:
        slot = candidate.slot
        outlook = outlooks[slot]
        best = None if outlook.speed is None else best_fit(need, outlook, books, now_s)
        warm = usd = 0.0
        if need.warm_tokens and any(seat.endpoint_slot == need.warm_slot for seat in outlook.seats):
            warm = min(1.0, need.warm_tokens / need.prompt_tokens)
        if candidate.usd_per_unit:
            usd = candidate.usd_per_unit * need.units
        load[slot] = Standing(
            in_flight_of(slot) + outlook.foreign,
            outlook.health,
            outlook.limit,
            outlook.units,
            best,
            warm,
            usd,
            outlook.places,
        )
    return load


def best_fit(need: Need, outlook: Outlook, books: Books, now_s: float) -> Fit | None:
    """How the request would do at the Deployment's best Endpoint, which is the one with the least token work."""
    speed, seats = outlook.speed, outlook.seats
    assert speed is not None
    if len(seats) == 1:
        endpoint_slot, engines = seats[0]
        work = books.work_at(endpoint_slot, speed.prompt_token_s, speed.window_s, now_s)
        return fit(need, speed, endpoint_slot, engines, work)
    chosen, chosen_work, least_s = None, None, float("inf")
    for seat in seats:
        endpoint_slot, engines = seat
        work = books.work_at(endpoint_slot, speed.prompt_token_s, speed.window_s, now_s)
        prompts = work[0] + (need.uncached_at(endpoint_slot) if endpoint_slot == need.warm_slot else need.prompt_tokens)
        ahead_s = ((prompts + work[3]) * speed.prompt_token_s + work[1] * speed.sequence_s) / engines
        if ahead_s < least_s:
            chosen, chosen_work, least_s = seat, work, ahead_s
    if chosen is None or chosen_work is None:
        return None
    return fit(need, speed, chosen.endpoint_slot, chosen.engines, chosen_work)
