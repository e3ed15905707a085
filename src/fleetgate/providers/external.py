"""Provider `external`: Endpoints that Fleetgate does not run, so it has none to start, stop or list."""

from collections.abc import Sequence

from fleetgate.providers.base import BadSpec, Replica, ReplicaSpec, Settings

NAME = "external"


class ExternalProvider:
    """The provider of Deployments with a `url:`."""

    name = NAME

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Refuse. Raises: `BadSpec`."""
        raise BadSpec(f"{spec.deployment}: provider external cannot run a workload; give `url:` instead of `workload:`")

    async def stop(self, replica: Replica) -> None:
        """Do nothing: there is no replica to stop."""

    async def list(self) -> Sequence[Replica]:
        """Return nothing: no replica is Fleetgate's own."""
        return ()


def make(settings: Settings) -> ExternalProvider:
    """Make the provider; it needs no settings."""
    return ExternalProvider()
