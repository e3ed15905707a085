"""Recorded arrivals simulated on two fleets: load that moves changes every decision after it."""

from collections.abc import Callable, Sequence

import msgspec

from fleetgate.core.model import Gateway, Snapshot, Upstream
from fleetgate.core.routing.decision_record import RecordedEnd
from fleetgate.simulator.fleet import BadFleet, SimulatedFleet, fleet_of
from fleetgate.simulator.serving.world import Arrival
from fleetgate.simulator.simulation import NotPossible, Simulation, SimulationSetting

ARRIVALS_MIN = 2  # one arrival has no rate


class ModelledFleet(msgspec.Struct, frozen=True, kw_only=True):
    """The simulated result of a fleet for the recorded arrivals. Units: `goodput_rps` of requests inside the SLO."""

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
    before: ModelledFleet
    after: ModelledFleet


class RecordedArrivals:
    """Collects arrivals by Gateway and model."""

    def __init__(self, region: str | None) -> None:
        self.by_route: dict[tuple[str, str], list[Arrival]] = {}
        self._region = region

    def add(self, ended: RecordedEnd) -> None:
        """Add the arrival of a request that ended."""
        arrivals = self.by_route.setdefault((ended.gateway, ended.model), [])
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
    arrivals: RecordedArrivals, before: Snapshot, after: Snapshot, warn: Callable[[str], None]
) -> tuple[list[CounterfactualPair], list[str]]:
    """Simulate each Gateway and model on both fleets; also returns a sentence for each that cannot be simulated."""
    pairs: list[CounterfactualPair] = []
    not_simulated: list[str] = []
    for (gateway, model), recorded in sorted(arrivals.by_route.items()):
        if len(recorded) < ARRIVALS_MIN:
            not_simulated.append(f"Gateway {gateway}, model {model}: {len(recorded)} request has no rate")
            continue
        recorded.sort(key=lambda arrival: arrival.at_s)
        try:
            old, new = (_run(_fleet(snapshot, gateway, model), recorded, warn) for snapshot in (before, after))
        except (BadFleet, NotPossible) as error:
            not_simulated.append(f"Gateway {gateway}, model {model}: {error}")
            continue
        pairs.append(CounterfactualPair(gateway=gateway, model=model, requests=len(recorded), before=old, after=new))
    return pairs, not_simulated


def _fleet(snapshot: Snapshot, name: str, model: str) -> SimulatedFleet:
    """One Gateway with only the upstreams that serve a model, because the simulator has only one model."""
    gateway = next((gateway for gateway in snapshot.gateways if gateway.name == name), None)
    serving = {deployment.name for deployment in snapshot.deployments if model in deployment.models}
    upstreams = _serving(gateway, serving)
    if gateway is None or not upstreams:
        raise BadFleet(f"one of the files has no Gateway {name} with model {model}")
    narrow = msgspec.structs.replace(gateway, upstreams=upstreams)
    return fleet_of(msgspec.structs.replace(snapshot, gateways=(narrow,)), name)


def _serving(gateway: Gateway | None, names: set[str]) -> tuple[Upstream, ...]:
    return tuple(u for u in gateway.upstreams if u.deployment in names) if gateway is not None else ()


def _run(fleet: SimulatedFleet, arrivals: Sequence[Arrival], warn: Callable[[str], None]) -> ModelledFleet:
    strategy = fleet.gateway.strategy
    simulation = Simulation(fleet, arrivals, SimulationSetting(strategies=(strategy,)), warn)
    score = simulation.run(strategy).score
    return ModelledFleet(
        strategy=strategy,
        goodput_rps=round(score.goodput_ratio * simulation.capacity_rps, 4),
        slo_ttft_share=score.slo_ttft_share,
        slo_tpot_share=score.slo_tpot_share,
        ttft_p50_s=score.ttft_p50_s,
        ttft_p99_s=score.ttft_p99_s,
        shed_share=score.shed_share,
        cost_usd_per_mtok=score.cost_usd_per_mtok,
    )
