"""Which Deployments may take a request now, and in what order: filter, then the Gateway's strategy."""

from collections.abc import Collection, Sequence
from enum import StrEnum

import msgspec

from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.capacity.units import REFERENCE_OUTPUT_TOKENS, REFERENCE_PROMPT_TOKENS
from fleetgate.core.model import Deployment, Gateway, Snapshot
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load, Ranking, Strategy, Turn, find, find_lead


class RejectionReason(StrEnum):
    """Why no Deployment can take a request."""

    NONE_UP = "none_up"
    ALL_FULL = "all_full"
    ALL_TRIED = "all_tried"
    ON_TRIAL = "on_trial"  # none is up, but a request tries one now, and its result comes soon
    DENIED = "denied"  # all refuse our credential; only the proxy knows, because the core sees them as not healthy


class Decision(msgspec.Struct, frozen=True):
    """The Deployments to try, in order, the strategy's memory, and why the others are excluded."""

    order: Sequence[Candidate]
    turn: Turn
    excluded: tuple[tuple[str, str], ...] = ()


class Rejection(msgspec.Struct, frozen=True):
    """No Deployment can take the request now. Shape: `excluded` has the name and the reason of each."""

    reason: RejectionReason
    excluded: tuple[tuple[str, str], ...] = ()


class ModelRoute(msgspec.Struct, frozen=True):
    """One model in one Gateway: the Deployments that serve it and the strategy that orders them.

    Built once for each Snapshot, so that a request only looks it up.
    """

    candidates: tuple[Candidate, ...]
    strategy: Strategy
    lead: Candidate | None = None  # first choice while healthy and below its spill limit, without a call of `route`


def model_routes(gateway: Gateway, snapshot: Snapshot, region: str) -> dict[str, ModelRoute]:
    """The routes of a Gateway by the model name that clients use. Shape: `region` is the proxy's own."""
    deployments = {deployment.name: deployment for deployment in snapshot.deployments}
    by_model: dict[str, list[Candidate]] = {}
    for upstream in gateway.upstreams:
        deployment = deployments[upstream.deployment]
        candidate = _candidate(gateway, deployment, upstream.rank, region)
        for model in deployment.models:
            by_model.setdefault(model, []).append(candidate)
    strategy, lead_of = find(gateway.strategy), find_lead(gateway.strategy)
    # Sorted, so that the order in which an operator writes Deployments decides nothing.
    ordered = {model: tuple(sorted(candidates, key=lambda c: c.name)) for model, candidates in by_model.items()}
    return {
        model: ModelRoute(candidates, strategy, candidates[0] if len(candidates) == 1 else lead_of(candidates))
        for model, candidates in ordered.items()
    }


def route(model_route: ModelRoute, load: Load, turn: Turn, tried: Collection[int] = ()) -> Decision | Rejection:
    """Order the Deployments that are up, have capacity and were not tried yet; or say why there is none.

    The first choice keeps the SLO of this request and of the requests already there. If no Deployment does both, it
    keeps that of this request only. Latency is predicted for the first choice, and for the others only if the first
    would miss the SLO: a prediction costs more than an order, and most first choices are good.
    Cost: about 2 µs with three candidates.
    """
    eligible: list[Candidate] = []
    excluded: list[tuple[str, str]] = []
    full = 0
    for candidate in model_route.candidates:
        state = load[candidate.slot]
        if candidate.slot in tried:
            excluded.append((candidate.name, "tried already"))
        elif state.health <= 0.0:
            excluded.append((candidate.name, "not healthy"))
        elif state.paused or (state.limit and state.in_flight >= state.limit):
            full += 1
            excluded.append((candidate.name, full_reason(state)))
        else:
            eligible.append(candidate)
    if eligible:
        ranking = model_route.strategy(eligible, load, turn)
        if ranking.order and load[ranking.order[0].slot].harms_slo:
            late = [candidate for candidate in eligible if load[candidate.slot].late]
            full += len(late)
            excluded += [(candidate.name, late_reason(load[candidate.slot].prediction)) for candidate in late]
            eligible = [candidate for candidate in eligible if candidate not in late]
            eligible = [candidate for candidate in eligible if not load[candidate.slot].harms_slo] or eligible
            ranking = model_route.strategy(eligible, load, turn) if eligible else Ranking((), turn)
        if ranking.order:
            return Decision(ranking.order, ranking.turn, tuple(excluded))
    reason = RejectionReason.ALL_FULL if full else RejectionReason.ALL_TRIED if tried else RejectionReason.NONE_UP
    return Rejection(reason, tuple(excluded))


def full_reason(state: CandidateState) -> str:
    """Why a Deployment is at its limit, as one sentence."""
    if state.paused:
        return "full: its engine asked for a pause (Retry-After)"
    return f"full: {state.in_flight} of {state.limit} in flight"


def late_reason(prediction: LatencyPrediction | None) -> str:
    """Why a Deployment below its limit has no room for this request, as one sentence."""
    assert prediction is not None
    figures = f"(TTFT {prediction.ttft_s:.2f} s, TPOT {prediction.tpot_s * 1e3:.0f} ms)"
    if prediction.late in ("TTFT", "TPOT"):
        return f"no room: the predicted {prediction.late} is over its target {figures}"
    return f"no room: the {prediction.late} would be full {figures}"


def _candidate(gateway: Gateway, deployment: Deployment, rank: int, region: str) -> Candidate:
    is_local = not region or deployment.region == region or gateway.locality == "ignore"
    return Candidate(
        name=deployment.name,
        slot=deployment.slot,
        region=deployment.region,
        rank=rank,
        limit=deployment.concurrency_max,
        overflow_at=gateway.overflow_at,
        usd_per_unit=_usd_per_unit(deployment),
        seconds_per_usd=gateway.seconds_per_usd,
        distance=0 if is_local else 1,
        paid_per_token=0 if gateway.tiers == "ignore" or not deployment.paid_per_token else 1,
    )


def _usd_per_unit(deployment: Deployment) -> float:
    """The price of a reference request: its tokens, or its share of the Deployment's price per hour."""
    price = deployment.price
    if price.usd_per_hour is not None:
        return price.usd_per_hour / 3600.0 / deployment.units if deployment.units else 0.0
    prompt, output = price.usd_per_mtok_input or 0.0, price.usd_per_mtok_output or 0.0
    return (REFERENCE_PROMPT_TOKENS * prompt + REFERENCE_OUTPUT_TOKENS * output) / 1e6
