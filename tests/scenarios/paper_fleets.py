"""Fleets and traces for the simulator's tests."""

from random import Random

from fleetgate.core.model import Deployment, Endpoint, Gateway, Price, Profile, Slo, Snapshot, Upstream
from fleetgate.simulator.fleet import SimulatedFleet, fleet_of
from fleetgate.simulator.serving.world import Arrival
from fleetgate.simulator.simulation import Simulation, SimulationOutcome, SimulationSetting

FAST = Profile(
    name="fast", prefill_tokens_per_s=16000.0, base_s=0.02, per_sequence_s=0.0003, batch_max=128, kv_tokens=600_000
)
SLOW = Profile(
    name="slow", prefill_tokens_per_s=3000.0, base_s=0.04, per_sequence_s=0.001, batch_max=64, kv_tokens=150_000
)


def deployment(
    name: str, profile: Profile | None, engines: int = 1, region: str = "us-east", price: Price | None = None
) -> Deployment:
    """A Deployment with `engines` replicas behind one address."""
    return Deployment(
        slot=0,
        name=name,
        region=region,
        engine="vllm",
        models={"m": "m"},
        endpoints=(Endpoint(slot=0, scheme="http", host="h", port=80, base_path="/v1", engines=engines),),
        profile=profile,
        accelerators=1,
        price=price or Price(),
    )


def snapshot_of(*deployments: Deployment, strategy: str = "capacity_round_robin", ranked: bool = False) -> Snapshot:
    """One Gateway over all of them, with equal ranks or ranked in order."""
    upstreams = tuple(Upstream(deployment=d.name, rank=n + 1 if ranked else 1) for n, d in enumerate(deployments))
    gateway = Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy=strategy,
        upstreams=upstreams,
        slo=Slo(tpot_s=0.08),
    )
    return Snapshot(version=1, made_at_s=0.0, gateways=(gateway,), deployments=deployments)


def fleet(*deployments: Deployment, ranked: bool = False) -> SimulatedFleet:
    """The simulated fleet."""
    return fleet_of(snapshot_of(*deployments, ranked=ranked))


def trace(count: int, seed: int = 1, regions: tuple[str, ...] = ("",), keys: tuple[str, ...] = ("",)) -> list[Arrival]:
    """Random arrivals of random shapes, one a second on average."""
    rng, at_s, arrivals = Random(seed), 0.0, []
    for index in range(count):
        at_s += rng.expovariate(1.0)
        prompt_tokens = min(8000, int(rng.lognormvariate(6.3, 0.9)) + 1)
        output_tokens = min(800, int(rng.expovariate(1 / 120)) + 1)
        arrivals.append(
            Arrival(
                index, at_s, prompt_tokens, output_tokens, region=regions[index % len(regions)], key=rng.choice(keys)
            )
        )
    return arrivals


def simulation(on: SimulatedFleet, arrivals: list[Arrival], **setting: object) -> Simulation:
    """A simulation that drops warnings."""
    return Simulation(on, arrivals, SimulationSetting(strategies=(), **setting), warn=lambda sentence: None)  # type: ignore[arg-type]


def run(on: SimulatedFleet, arrivals: list[Arrival], strategy: str, **setting: object) -> SimulationOutcome:
    """One strategy over one trace."""
    return simulation(on, arrivals, **setting).run(strategy)
