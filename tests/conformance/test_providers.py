"""What every provider keeps: found by its file alone, four errors, adoption, a stop that is final."""

import asyncio
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import fleetgate.providers
from fleetgate.providers.base import (
    Factory,
    Provider,
    ProviderError,
    Replica,
    ReplicaSpec,
    ReplicaState,
    ReplicaWorkload,
    Settings,
    discover,
)

READY_S_MAX = 60
WORKLOAD = ReplicaWorkload(
    command=(sys.executable, "-m", "fleetgate.engine"),
    args=("--listen", "127.0.0.1:{port}"),
    health="/health",
)


def spec(replica_id: str, workload: ReplicaWorkload = WORKLOAD) -> ReplicaSpec:
    """A replica that every provider can run."""
    return ReplicaSpec(id=replica_id, deployment="m", cluster="here", region="eu", workload=workload)


async def until(provider: Provider, replica_id: str, state: ReplicaState | None) -> Replica | None:
    """Look until a replica is in a state; None for "no longer listed"."""
    async with asyncio.timeout(READY_S_MAX):
        while True:
            found = {replica.id: replica for replica in await provider.list()}.get(replica_id)
            if (found.state if found else None) == state:
                return found
            await asyncio.sleep(0.05)


async def check_life(make: Factory, settings: Settings) -> bool:
    """Start, ready, adoption by a second instance, stop; False if the provider starts nothing."""
    provider = make(settings)
    assert not await provider.list()
    try:
        begun = await provider.start(spec("m-0"))
    except ProviderError as error:
        assert str(error)
        assert not await provider.list()
        return False
    assert (begun.id, begun.deployment, begun.fingerprint) == ("m-0", "m", WORKLOAD.fingerprint)
    ready = await until(provider, "m-0", ReplicaState.READY)
    assert ready is not None
    assert ready.url.endswith("/v1")
    later = make(settings)
    adopted = await until(later, "m-0", ReplicaState.READY)
    assert adopted is not None
    assert msgspec.structs.replace(adopted, because="") == msgspec.structs.replace(ready, because="")
    other = await later.start(spec("m-1"))
    assert other.url != ready.url
    await until(later, "m-1", ReplicaState.READY)
    await later.stop(ready)
    await until(later, "m-0", None)
    assert [replica.id for replica in await later.list()] == ["m-1"]
    await later.stop(ready)  # once more is no error
    await later.stop(other)
    assert not await later.list()
    return True


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """A data directory, and a life that ends with the test."""
    read_end, write_end = os.pipe()
    yield Settings(data_dir=tmp_path, life_fd=read_end)
    os.close(write_end)
    os.close(read_end)


@pytest.mark.parametrize("name", sorted(discover()))
def test_a_provider_keeps_the_contract(name: str, settings: Settings) -> None:
    make = discover()[name]
    assert make(settings).name == name
    started = asyncio.run(check_life(make, settings))
    assert started == (name != "external")


@pytest.mark.parametrize("name", sorted(discover()))
def test_a_workload_that_cannot_run_is_refused_and_leaves_nothing(name: str, settings: Settings) -> None:
    provider = discover()[name](settings)

    async def refused() -> None:
        with pytest.raises(ProviderError):
            await provider.start(spec("m-0", ReplicaWorkload()))
        assert not await provider.list()

    asyncio.run(refused())


DROPPED = '''
    """Provider `shelf`: replicas are lines in a file."""

    from fleetgate.providers.base import BadSpec, Replica, ReplicaState

    NAME = "shelf"


    class Shelf:
        name = NAME

        def __init__(self, settings):
            self._folder = settings.data_dir

        async def start(self, spec):
            if not spec.workload.command:
                raise BadSpec("give workload.command")
            replica = Replica(
                id=spec.id,
                deployment=spec.deployment,
                url=f"http://{spec.id}.test/v1",
                state=ReplicaState.READY,
                fingerprint=spec.workload.fingerprint,
            )
            (self._folder / spec.id).write_text(f"{spec.deployment} {spec.workload.fingerprint}")
            return replica

        async def stop(self, replica):
            (self._folder / replica.id).unlink(missing_ok=True)

        async def list(self):
            found = []
            for path in sorted(self._folder.iterdir()):
                deployment, fingerprint = path.read_text().split()
                url = f"http://{path.name}.test/v1"
                state = ReplicaState.READY
                found.append(
                    Replica(id=path.name, deployment=deployment, url=url, state=state, fingerprint=fingerprint)
                )
            return found


    make = Shelf
'''


def test_one_dropped_file_is_a_provider(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "shelf.py").write_text(textwrap.dedent(DROPPED))
    monkeypatch.setattr(fleetgate.providers, "__path__", [*fleetgate.providers.__path__, str(folder)])
    found = discover()
    assert set(found) >= {"external", "local", "shelf"}
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    assert asyncio.run(check_life(found["shelf"], Settings(data_dir=data_dir)))
