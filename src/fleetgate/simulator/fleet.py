"""The simulated fleet of a Snapshot: one engine for each replica, with its round trips to every proxy."""

from collections.abc import Sequence

import msgspec

from fleetgate.core.model import Deployment, Endpoint, Gateway, Slo, Snapshot
from fleetgate.simulator.region_rtt import RegionRtts
from fleetgate.simulator.serving.replica import SimulatedReplica
from fleetgate.simulator.serving.world import SimulatedEngine

MODEL = "*"  # a trace names no model, so every Deployment of the Gateway serves this one


class BadFleet(Exception):
    """The fleet cannot be simulated; the message says what to add."""


class UnclearGateway(BadFleet):
    """The file has several Gateways, or none of the given name; `--gateway` selects one."""


class SimulatedFleet(msgspec.Struct, frozen=True):
    """One Gateway, and its Deployments with one Endpoint for each replica."""

    gateway: Gateway
    deployments: tuple[Deployment, ...]

    @property
    def slo(self) -> Slo:
        """The Gateway's SLO, or the defaults."""
        return self.gateway.slo or Slo()

    @property
    def snapshot(self) -> Snapshot:
        """The fleet as a proxy receives it."""
        return Snapshot(version=1, made_at_s=0.0, gateways=(self.gateway,), deployments=self.deployments)

    def deployment(self, name: str) -> Deployment | None:
        """A Deployment by name."""
        return next((deployment for deployment in self.deployments if deployment.name == name), None)


def fleet_of(snapshot: Snapshot, gateway: str = "") -> SimulatedFleet:
    """One Gateway of a Snapshot with its Deployments.

    Raises: `UnclearGateway`; `BadFleet` if there is no Gateway, or a Deployment has no Profile.
    """
    names = [known.name for known in snapshot.gateways]
    chosen = [known for known in snapshot.gateways if gateway in ("", known.name)]
    if not names:
        raise BadFleet("the fleet has no Gateway; add `kind: Gateway` that lists the Deployments as upstreams")
    if len(chosen) != 1:
        problem = (
            f"--gateway {gateway!r} is not in the fleet"
            if gateway
            else "only one Gateway is simulated; select it with --gateway"
        )
        raise UnclearGateway(f"{problem}; the fleet has: {', '.join(names)}")
    listed = {upstream.deployment for upstream in chosen[0].upstreams}
    deployments, slot = [], 0
    for index, deployment in enumerate(d for d in snapshot.deployments if d.name in listed):
        if deployment.profile is None:
            raise BadFleet(
                f"Deployment {deployment.name} has no Profile, so its speed is not known; "
                "add `kind: Profile` and name it in `profile:` (or run `fleetgate calibrate`)"
            )
        count = max(1, sum(endpoint.engines for endpoint in deployment.endpoints))
        endpoints = tuple(
            Endpoint(slot=slot + n, scheme="http", host="simulated", port=80, base_path="/v1") for n in range(count)
        )
        slot += count
        deployments.append(msgspec.structs.replace(deployment, slot=index, models={MODEL: MODEL}, endpoints=endpoints))
    return SimulatedFleet(chosen[0], tuple(deployments))


def engines_of(fleet: SimulatedFleet, proxy_regions: Sequence[str], rtts: RegionRtts) -> list[SimulatedEngine]:
    """New engines for one run, in the order of their Endpoints' slots."""
    engines = []
    for deployment in fleet.deployments:
        assert deployment.profile is not None
        rtts_s = [rtts.between_s(region, deployment.region) for region in proxy_regions]
        engines += [
            SimulatedEngine(deployment, SimulatedReplica(deployment.profile), rtts_s) for _ in deployment.endpoints
        ]
    return engines
