"""The interface of providers. A provider starts, stops and lists the replicas of managed Deployments.

One file in this folder adds a provider. It has a `NAME` and a function `make(settings: Settings) -> Provider`;
`discover` finds it, and the conformance suite tests it.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Protocol, cast

import msgspec

import fleetgate.providers


class ProviderError(Exception):
    """A provider failed; the text is a sentence for an Event."""


class NotNow(ProviderError):
    """No capacity at the moment: another Cluster, or a later try, may succeed."""


class BadSpec(ProviderError):
    """The Deployment is wrong: a start fails again until it is changed."""


class Denied(ProviderError):
    """The Cluster refused Fleetgate's credentials."""


class Broken(ProviderError):
    """The Cluster does not answer, or its answer makes no sense."""


class ReplicaWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica runs.

    Shape: `{port}` in command, args and env values stands for the replica's port; `port` 0 lets the provider choose.
    """

    image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    port: int = 0
    health: str = "/health"

    @property
    def fingerprint(self) -> str:
        """A hash of this workload. A replica with another one is out of date."""
        return hashlib.blake2b(msgspec.json.encode(self, order="deterministic"), digest_size=8).hexdigest()


class ManagedDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """A Deployment with replicas that Fleetgate runs."""

    name: str
    cluster: str
    provider: str
    region: str
    workload: ReplicaWorkload
    replicas_desired: int


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One replica to start. Shape: `id` is a DNS label, unique among all running replicas."""

    id: str
    deployment: str
    cluster: str
    region: str
    workload: ReplicaWorkload


class ReplicaState(StrEnum):
    """The state of a replica."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"  # it exited without a stop; `because` says how


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as its provider reports it.

    Shape: `url` is the base URL for an SDK, with its `/v1`; `ref` is the provider's own name for the replica;
    `fingerprint` is that of the workload it runs.
    """

    id: str
    deployment: str
    url: str
    state: ReplicaState
    fingerprint: str
    ref: str = ""
    because: str = ""


class Provider(Protocol):
    """One kind of Cluster. Every method raises only the four subclasses of `ProviderError`."""

    @property
    def name(self) -> str:
        """The value of `provider:` in a Cluster."""

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Start a replica and return before it is ready."""

    async def stop(self, replica: Replica) -> None:
        """Stop a replica and forget it. It is no error if the replica is gone already."""

    async def list(self) -> Sequence[Replica]:
        """List every replica that runs or has failed, also those that an earlier control process started."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider gets from the control process.

    Shape: `life_fd` is the read end of a pipe that closes when the supervisor exits; -1 without a supervisor.
    """

    data_dir: Path
    life_fd: int = -1


Factory = Callable[[Settings], Provider]


def discover() -> Mapping[str, Factory]:
    """Find every provider in this folder, by name."""
    found: dict[str, Factory] = {}
    for file in pkgutil.iter_modules(fleetgate.providers.__path__):
        module = importlib.import_module(f"{fleetgate.providers.__name__}.{file.name}")
        if hasattr(module, "NAME") and hasattr(module, "make"):
            found[module.NAME] = cast(Factory, module.make)
    return found
