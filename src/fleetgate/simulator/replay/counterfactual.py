"""Recorded arrivals played to two fleets on paper: what moved load does to everything that comes after it."""

from collections.abc import Callable, Sequence

import msgspec

from fleetgate.core.model import Gateway, Snapshot, Upstream
from fleetgate.core.routing.decision_record import RecordedEnd
from fleetgate.simulator.fleet import BadFleet, SimulatedFleet, fleet_of
from fleetgate.simulator.simulation import NotPossible, Simulation, SimulationSetting
from fleetgate.simulator.world import Arrival

ARRIVALS_MIN = 2  # with one there is no rate


class ModelledDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """How a fleet does with the recorded arrivals, by the simulator. Units: `goodput_rps` of requests in the SLO."""

    strategy: str
    goodput_rps: float
    slo_ttft_share: float
    slo_tpot_share: float
    ttft_p50_s: float
    ttft_p99_s: float
    shed_share: float
    cost_usd_per_mtok: float | None


class CounterfactualPair(msgspec.Struct, frozen=True, kw_only=True):
    """One model in one Gateway under both files."""

    gateway: str
    model: str
    requests: int
    before: ModelledDeployment
    after: ModelledDeployment


class Arrivals:
    """Collects what came, by Gateway and model."""

    def __init__(self, region: str | None) -> None:
        self.lanes: dict[tuple[str, str], list[Arrival]] = {}
        self._region = region

    def see(self, ended: RecordedEnd) -> None:
        """A request that ended came so long before."""
        arrivals = self.lanes.setdefault((ended.gateway, ended.model), [])
        arrivals.append(
            Arrival(
                index=len(arrivals),
                at_s=ended.at_s - ended.duration_s,
                prompt_tokens=max(1, round(ended.prompt_tokens)),
                output_tokens=max(1, round(ended.output_tokens)),
                region=ended.region if self._region is None else self._region,
                key=ended.key,
            )
        )


def simulate_pairs(
    arrivals: Arrivals, before: Snapshot, after: Snapshot, warn: Callable[[str], None]
) -> tuple[list[CounterfactualPair], list[str]]:
    """Play each Gateway and model to both fleets; sentences say which cannot be, and why."""
    pairs: list[CounterfactualPair] = []
    why_not: list[str] = []
    for (gateway, model), came in sorted(arrivals.lanes.items()):
        if len(came) < ARRIVALS_MIN:
            why_not.append(f"Gateway {gateway}, model {model}: {len(came)} request has no rate")
            continue
        came.sort(key=lambda arrival: arrival.at_s)
        try:
            was, would = (_run(_fleet(snapshot, gateway, model), came, warn) for snapshot in (before, after))
        except (BadFleet, NotPossible) as error:
            why_not.append(f"Gateway {gateway}, model {model}: {error}")
            continue
        pairs.append(CounterfactualPair(gateway=gateway, model=model, requests=len(came), before=was, after=would))
    return pairs, why_not


def _fleet(snapshot: Snapshot, name: str, model: str) -> SimulatedFleet:
    """One Gateway with only the upstreams that serve a model, for the simulator knows but one."""
    gateway = next((gateway for gateway in snapshot.gateways if gateway.name == name), None)
    serving = {deployment.name for deployment in snapshot.deployments if model in deployment.models}
    upstreams = _serving(gateway, serving)
    if gateway is None or not upstreams:
        raise BadFleet(f"one of the files has no Gateway {name} with model {model}")
    narrow = msgspec.structs.replace(gateway, upstreams=upstreams)
    return fleet_of(msgspec.structs.replace(snapshot, gateways=(narrow,)), name)


def _serving(gateway: Gateway | None, names: set[str]) -> tuple[Upstream, ...]:
    return tuple(u for u in gateway.upstreams if u.deployment in names) if gateway is not None else ()


def _run(fleet: SimulatedFleet, came: Sequence[Arrival], warn: Callable[[str], None]) -> ModelledDeployment:
    strategy = fleet.gateway.strategy
    simulation = Simulation(fleet, came, SimulationSetting(strategies=(strategy,)), warn)
    score = simulation.run(strategy).score
    return ModelledDeployment(
        strategy=strategy,
        goodput_rps=round(score.goodput_ratio * simulation.capacity_rps, 4),
        slo_ttft_share=score.slo_ttft_share,
        slo_tpot_share=score.slo_tpot_share,
        ttft_p50_s=score.ttft_p50_s,
        ttft_p99_s=score.ttft_p99_s,
        shed_share=score.shed_share,
        cost_usd_per_mtok=score.cost_usd_per_mtok,
    )
