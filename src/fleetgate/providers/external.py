"""Provider `external`: Endpoints that somebody else runs; there is nothing to start, stop or list."""

from collections.abc import Sequence

from fleetgate.providers.base import BadSpec, Replica, ReplicaSpec, Settings

NAME = "external"


class ExternalProvider:
    """The provider of Deployments that are a URL."""

    name = NAME

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Refuse: an external Deployment is given by its address."""
        raise BadSpec(f"{spec.deployment}: provider external starts nothing; give `url:` instead of `workload:`")

    async def stop(self, replica: Replica) -> None:
        """Do nothing: what was never started is stopped."""

    async def list(self) -> Sequence[Replica]:
        """Nothing is ever ours."""
        return ()


def make(settings: Settings) -> ExternalProvider:
    """The provider; it needs no settings."""
    return ExternalProvider()
