"""Which Deployments may take a request now, and in what order: filter, then the Gateway's strategy."""

from collections.abc import Collection, Sequence
from enum import StrEnum

import msgspec

from fleetgate.core.capacity.latency_model import LatencyPrediction
from fleetgate.core.capacity.units import REFERENCE_OUTPUT_TOKENS, REFERENCE_PROMPT_TOKENS
from fleetgate.core.model import Deployment, Gateway, Snapshot
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load, Ranking, Strategy, Turn, find, find_lead


class RejectionReason(StrEnum):
    """Why nobody can take a request."""

    NONE_UP = "none_up"
    ALL_FULL = "all_full"
    ALL_TRIED = "all_tried"
    ON_TRIAL = "on_trial"  # nobody is up, and somebody is being tried out, which will soon show something
    DENIED = "denied"  # all refuse our credential; only who knows why they are out can tell


class Decision(msgspec.Struct, frozen=True):
    """Whom to try, in order, what the strategy wants to remember, and why others were left out."""

    order: Sequence[Candidate]
    turn: Turn
    excluded: tuple[tuple[str, str], ...] = ()


class Rejection(msgspec.Struct, frozen=True):
    """Nobody can take it now; `excluded` says why of each Deployment."""

    reason: RejectionReason
    excluded: tuple[tuple[str, str], ...] = ()


class ModelRoute(msgspec.Struct, frozen=True):
    """One model in one Gateway: the Deployments that serve it and the strategy that orders them.

    Made once per Snapshot, so that a request only looks it up.
    """

    candidates: tuple[Candidate, ...]
    strategy: Strategy
    lead: Candidate | None = None  # comes first while healthy and below its spill limit: `route` need not be asked


def model_routes(gateway: Gateway, snapshot: Snapshot, region: str) -> dict[str, ModelRoute]:
    """The Lanes of a Gateway by the model names that clients ask for; `region` is the proxy's own."""
    deployments = {deployment.name: deployment for deployment in snapshot.deployments}
    by_model: dict[str, list[Candidate]] = {}
    for upstream in gateway.upstreams:
        deployment = deployments[upstream.deployment]
        candidate = _candidate(gateway, deployment, upstream.rank, region)
        for model in deployment.models:
            by_model.setdefault(model, []).append(candidate)
    strategy, lead_of = find(gateway.strategy), find_lead(gateway.strategy)
    # Sorted, so that the order in which an operator writes Deployments can never decide anything.
    ordered = {model: tuple(sorted(candidates, key=lambda c: c.name)) for model, candidates in by_model.items()}
    return {
        model: ModelRoute(candidates, strategy, candidates[0] if len(candidates) == 1 else lead_of(candidates))
        for model, candidates in ordered.items()
    }


def route(lane: ModelRoute, load: Load, turn: Turn, tried: Collection[int] = ()) -> Decision | Rejection:
    """Order the Deployments that are up, have a place and were not tried yet; or say why there is none.

    Whoever comes first keeps the SLO, its own and that of those who are there; the latter gives way where nobody else
    has room. Only the first is asked, and the others if it would not: predicting costs more than ordering, and most
    requests go where they should. Cost: about 2 µs with three candidates.
    """
    fit: list[Candidate] = []
    excluded: list[tuple[str, str]] = []
    full = 0
    for candidate in lane.candidates:
        standing = load[candidate.slot]
        if candidate.slot in tried:
            excluded.append((candidate.name, "tried already"))
        elif standing.health <= 0.0:
            excluded.append((candidate.name, "not healthy"))
        elif standing.paused or (standing.limit and standing.in_flight >= standing.limit):
            full += 1
            excluded.append((candidate.name, full_reason(standing)))
        else:
            fit.append(candidate)
    if fit:
        ranking = lane.strategy(fit, load, turn)
        if ranking.order and load[ranking.order[0].slot].harms_slo:
            late = [candidate for candidate in fit if load[candidate.slot].late]
            full += len(late)
            excluded += [(candidate.name, late_reason(load[candidate.slot].fit)) for candidate in late]
            fit = [candidate for candidate in fit if candidate not in late]
            fit = [candidate for candidate in fit if not load[candidate.slot].harms_slo] or fit
            ranking = lane.strategy(fit, load, turn) if fit else Ranking((), turn)
        if ranking.order:
            return Decision(ranking.order, ranking.turn, tuple(excluded))
    reason = RejectionReason.ALL_FULL if full else RejectionReason.ALL_TRIED if tried else RejectionReason.NONE_UP
    return Rejection(reason, tuple(excluded))


def full_reason(standing: CandidateState) -> str:
    """Why a Deployment has no free place."""
    if standing.paused:
        return "full: its engine asked for a pause (Retry-After)"
    return f"full: {standing.in_flight} of {standing.limit} in flight"


def late_reason(fit: LatencyPrediction | None) -> str:
    """Why a Deployment with free places has no room for this request."""
    assert fit is not None
    return f"no room: {fit.late} would be over its target (TTFT {fit.ttft_s:.2f} s, TPOT {fit.tpot_s * 1e3:.0f} ms)"


def _candidate(gateway: Gateway, deployment: Deployment, rank: int, region: str) -> Candidate:
    local = not region or deployment.region == region or gateway.locality == "ignore"
    return Candidate(
        name=deployment.name,
        slot=deployment.slot,
        region=deployment.region,
        rank=rank,
        limit=deployment.concurrency_max,
        overflow_at=gateway.overflow_at,
        usd_per_unit=_usd_per_unit(deployment),
        seconds_per_usd=gateway.seconds_per_usd,
        distance=0 if local else 1,
        paid_per_token=0 if gateway.tiers == "ignore" or not deployment.paid_per_token else 1,
    )


def _usd_per_unit(deployment: Deployment) -> float:
    """The price of a reference request: its tokens, or its share of what the Deployment costs an hour."""
    price = deployment.price
    if price.usd_per_hour is not None:
        return price.usd_per_hour / 3600.0 / deployment.units if deployment.units else 0.0
    prompt, output = price.usd_per_mtok_input or 0.0, price.usd_per_mtok_output or 0.0
    return (REFERENCE_PROMPT_TOKENS * prompt + REFERENCE_OUTPUT_TOKENS * output) / 1e6
