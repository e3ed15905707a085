"""The score of a run."""

from collections.abc import Sequence

import msgspec

from fleetgate.core.capacity.units import ttft_target_s
from fleetgate.core.model import Price
from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.serving.world import Arrival, World
from fleetgate.simulator.trace_capacity import fastest_idle_s


class Score(msgspec.Struct, frozen=True):
    """The score of one strategy. The fields' names are the keys of `-o json`.

    Units: shares of all arrivals; `ttft_*` of those that were served; `cost_usd_per_mtok` for tokens inside the SLO,
    None if no Deployment has a price; `jain` 1 if every key had the same share of its work served inside the SLO.
    """

    strategy: str
    load: float | None
    seed: int
    goodput_ratio: float
    slo_ttft_share: float
    slo_tpot_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    shed_share: float
    overcommit_max: float
    spill_ratio: float
    cost_usd_per_mtok: float | None
    jain: float


class RunSetting(msgspec.Struct, frozen=True):
    """The settings of a run. Units: `capacity_rps` of all Deployments; `work` by arrival, 1 on average."""

    strategy: str
    load: float | None
    seed: int
    capacity_rps: float
    work: Sequence[float]


def slo_met(arrival: Arrival, fleet: SimulatedFleet) -> tuple[bool, bool]:
    """Whether a request met its TTFT and its TPOT target; a request that was not served met neither."""
    if arrival.ended_s < 0.0:
        return False, False
    slo = fleet.slo
    target_s = ttft_target_s(slo, arrival.prompt_tokens, fastest_idle_s(fleet, arrival.prompt_tokens))
    tpot_s = (arrival.ended_s - arrival.first_s) / max(1, arrival.output_tokens - 1)
    return arrival.first_s - arrival.at_s <= target_s, tpot_s <= slo.tpot_s


def score(run: RunSetting, fleet: SimulatedFleet, arrivals: Sequence[Arrival], world: World) -> Score:
    """The score of a finished run."""
    verdicts = [slo_met(arrival, fleet) for arrival in arrivals]
    count = len(arrivals)
    span_s = max(1e-9, arrivals[-1].at_s - arrivals[0].at_s)
    good_work = sum(work for work, verdict in zip(run.work, verdicts, strict=True) if all(verdict))
    ttfts = sorted(arrival.first_s - arrival.at_s for arrival in arrivals if arrival.ended_s >= 0.0)
    return Score(
        strategy=run.strategy,
        load=run.load,
        seed=run.seed,
        goodput_ratio=round(good_work / span_s / run.capacity_rps, 4),
        slo_ttft_share=round(sum(ttft for ttft, _ in verdicts) / count, 4),
        slo_tpot_share=round(sum(tpot for _, tpot in verdicts) / count, 4),
        ttft_p50_s=round(quantile(ttfts, 0.5), 4),
        ttft_p99_s=round(quantile(ttfts, 0.99), 4),
        shed_share=round(sum(arrival.ended_s < 0.0 for arrival in arrivals) / count, 4),
        overcommit_max=round(world.overcommit_max, 4),
        spill_ratio=round(spill_ratio(fleet, arrivals, world), 4),
        cost_usd_per_mtok=cost_usd_per_mtok(fleet, arrivals, verdicts, world),
        jain=round(jain(arrivals, verdicts, run.work), 4),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of sorted values, 0 without values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def spill_ratio(fleet: SimulatedFleet, arrivals: Sequence[Arrival], world: World) -> float:
    """The share of served requests not on the first rank or, if all ranks are equal, outside their own region."""
    ranks = {upstream.deployment: upstream.rank for upstream in fleet.gateway.upstreams}
    first = min(ranks.values())
    served = [arrival for arrival in arrivals if arrival.ended_s >= 0.0]
    ranked = len(set(ranks.values())) > 1
    spilled = 0
    for arrival in served:
        deployment = world.engines[arrival.replica].deployment
        home = arrival.region or world.proxy_regions[arrival.proxy]
        spilled += ranks[deployment.name] > first if ranked else bool(home) and deployment.region != home
    return spilled / max(1, len(served))


def cost_usd_per_mtok(
    fleet: SimulatedFleet, arrivals: Sequence[Arrival], verdicts: Sequence[tuple[bool, bool]], world: World
) -> float | None:
    """USD per million tokens inside the SLO; hourly prices count for the whole run, token prices for served tokens."""
    prices = {deployment.slot: deployment.price for deployment in fleet.deployments}
    if all(price == Price() for price in prices.values()):
        return None
    hours = (arrivals[-1].at_s - arrivals[0].at_s) / 3600.0
    usd = sum((price.usd_per_hour or 0.0) * hours for price in prices.values())
    tokens = 0
    for arrival, verdict in zip(arrivals, verdicts, strict=True):
        if arrival.ended_s >= 0.0:
            price = prices[world.engines[arrival.replica].deployment.slot]
            usd += arrival.prompt_tokens * (price.usd_per_mtok_input or 0.0) / 1e6
            usd += arrival.output_tokens * (price.usd_per_mtok_output or 0.0) / 1e6
        if all(verdict):
            tokens += arrival.prompt_tokens + arrival.output_tokens
    return round(usd / tokens * 1e6, 4) if tokens else None


def jain(arrivals: Sequence[Arrival], verdicts: Sequence[tuple[bool, bool]], work: Sequence[float]) -> float:
    """Jain's fairness index of the share of each key's work that was served inside the SLO."""
    offered: dict[str, float] = {}
    served: dict[str, float] = {}
    for arrival, verdict, weight in zip(arrivals, verdicts, work, strict=True):
        offered[arrival.key] = offered.get(arrival.key, 0.0) + weight
        served[arrival.key] = served.get(arrival.key, 0.0) + (weight if all(verdict) else 0.0)
    shares = [served[key] / offered[key] for key in sorted(offered)]
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0
