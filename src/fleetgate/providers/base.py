"""The provider seam: a provider starts, stops and lists the replicas of managed Deployments in one kind of place.

One file in this folder adds one. It has a `NAME` and a function `make(settings: Settings) -> Provider`; `discover`
finds it, and the conformance suite tests it.
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
    """A provider could not do what it was asked; the text is a sentence for the Event log."""


class NotNow(ProviderError):
    """No room or no stock at the moment: another place, or later, may do."""


class BadSpec(ProviderError):
    """The operator's mistake: it will fail again until the Deployment is changed."""


class Denied(ProviderError):
    """The place refused our credentials."""


class Broken(ProviderError):
    """The place itself does not answer, or answers nonsense."""


class ReplicaWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica runs. Shape: `{port}` in command, args and env values is the replica's port; `port` 0 is any."""

    image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    port: int = 0
    health: str = "/health"

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this workload: a replica that runs another one is out of date."""
        return hashlib.blake2b(msgspec.json.encode(self, order="deterministic"), digest_size=8).hexdigest()


class ManagedDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """A Deployment whose replicas we keep running."""

    name: str
    cluster: str
    provider: str
    region: str
    workload: ReplicaWorkload
    replicas_desired: int


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One replica to start. Shape: `id` is a DNS label, unique among all replicas that run."""

    id: str
    deployment: str
    cluster: str
    region: str
    workload: ReplicaWorkload


class ReplicaState(StrEnum):
    """How far a replica is."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"  # it ended by itself; `because` says how


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as its provider sees it.

    Shape: `url` is the base an SDK would be given, with its `/v1`; `ref` is the provider's own name for it;
    `fingerprint` is that of the Workload it runs.
    """

    id: str
    deployment: str
    url: str
    state: ReplicaState
    fingerprint: str
    ref: str = ""
    because: str = ""


class Provider(Protocol):
    """One kind of place. Every method raises only the four errors above."""

    @property
    def name(self) -> str:
        """The word a Cluster's `provider:` says."""

    async def start(self, spec: ReplicaSpec) -> Replica:
        """Start a replica and return before it is ready."""

    async def stop(self, replica: Replica) -> None:
        """Stop a replica and forget it; one that is gone already is no error."""

    async def list(self) -> Sequence[Replica]:
        """Every replica that runs or has failed, also those that an earlier process of ours started."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider may need from the process it lives in.

    Shape: `life_fd` is the read end of a pipe that ends when the supervisor does, -1 where there is none.
    """

    data_dir: Path
    life_fd: int = -1


Factory = Callable[[Settings], Provider]


def discover() -> Mapping[str, Factory]:
    """Every provider in this folder, by name."""
    found: dict[str, Factory] = {}
    for file in pkgutil.iter_modules(fleetgate.providers.__path__):
        module = importlib.import_module(f"{fleetgate.providers.__name__}.{file.name}")
        if hasattr(module, "NAME") and hasattr(module, "make"):
            found[module.NAME] = cast(Factory, module.make)
    return found
