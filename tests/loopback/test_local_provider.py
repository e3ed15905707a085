"""Provider local with real processes: what ends when, what is found again, what is told."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleetgate.control.reconciler.reconciler import Reconciler
from fleetgate.providers.base import (
    BadSpec,
    ManagedDeployment,
    NotNow,
    Replica,
    ReplicaSpec,
    ReplicaState,
    ReplicaWorkload,
    Settings,
)
from fleetgate.providers.local import LocalProvider
from fleetgate.providers.local_shim import process_start
from tests.waiting import wait_for

WAIT_S_MAX = 60
ENGINE = ReplicaWorkload(
    command=(sys.executable, "-m", "fleetgate.engine", "--listen", "127.0.0.1:{port}"), args=("--slots", "2")
)
STUBBORN = ReplicaWorkload(
    command=(
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
    )
)


def spec(replica_id: str, workload: ReplicaWorkload) -> ReplicaSpec:
    """A replica on this machine."""
    return ReplicaSpec(id=replica_id, deployment="m", cluster="here", region="eu", workload=workload)


async def come(what: Callable[[], bool]) -> None:
    """Wait until something holds, while the event loop goes on."""
    await asyncio.to_thread(wait_for, what)


async def until(provider: LocalProvider, state: ReplicaState) -> Replica:
    """Look until the only replica is in a state."""
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            replicas = await provider.list()
            if [replica.state for replica in replicas] == [state]:
                return replicas[0]
            await asyncio.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return process_start(pid) != 0


class Life:
    """The pipe that a supervisor holds."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def end(self) -> None:
        """The supervisor is gone."""
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1


@pytest.fixture
def life() -> Iterator[Life]:
    """A supervisor's life; what a test leaves behind ends with it."""
    life = Life()
    yield life
    life.end()
    os.close(life.read_end)


@pytest.fixture
def provider(tmp_path: Path, life: Life) -> LocalProvider:
    """A provider with a data directory of its own."""
    return LocalProvider(Settings(data_dir=tmp_path, life_fd=life.read_end))


def test_an_engine_ends_with_the_supervisor_even_one_that_ignores_sigterm(
    provider: LocalProvider, life: Life, tmp_path: Path
) -> None:
    async def begin() -> int:
        replica = await provider.start(spec("m-0", STUBBORN))
        log = tmp_path / "engines" / "m-0.log"
        await asyncio.to_thread(wait_for, lambda: log.read_text() == "up\n")
        return int(replica.ref)

    pid = asyncio.run(begin())
    assert is_running(pid)
    life.end()
    wait_for(lambda: not is_running(pid))
    wait_for(lambda: not (tmp_path / "engines" / "m-0.json").exists())


def test_engines_survive_the_process_that_started_them(tmp_path: Path, life: Life) -> None:
    script = f"""
        import asyncio, pathlib, sys
        sys.path.insert(0, {str(Path.cwd())!r})
        from fleetgate.providers.base import Settings
        from fleetgate.providers.local import LocalProvider
        from tests.loopback.test_local_provider import ENGINE, spec, until
        from fleetgate.providers.base import ReplicaState
        async def main():
            provider = LocalProvider(Settings(data_dir=pathlib.Path({str(tmp_path)!r}), life_fd={life.read_end}))
            await provider.start(spec("m-0", ENGINE))
            print((await until(provider, ReplicaState.READY)).ref, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    starter = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, pass_fds=(life.read_end,)
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    starter.stdout.close()
    heir = LocalProvider(Settings(data_dir=tmp_path, life_fd=life.read_end))
    adopted = asyncio.run(until(heir, ReplicaState.READY))
    assert adopted.ref == str(pid)
    assert is_running(pid)
    asyncio.run(heir.stop(adopted))
    assert not is_running(pid)


def test_an_engine_dies_with_a_shim_that_is_killed(provider: LocalProvider, tmp_path: Path) -> None:
    async def run() -> None:
        await provider.start(spec("m-0", ENGINE))
        replica = await until(provider, ReplicaState.READY)
        os.kill(_shim_of(tmp_path), signal.SIGKILL)
        failed = await until(provider, ReplicaState.FAILED)
        await asyncio.to_thread(wait_for, lambda: not is_running(int(replica.ref)))
        assert failed.because
        await provider.stop(failed)
        assert not await provider.list()

    asyncio.run(run())


def _shim_of(data_dir: Path) -> int:
    return int(json.loads((data_dir / "engines" / "m-0.json").read_text())["keeper_pid"])


def test_how_an_engine_ended_is_told_with_its_last_words(provider: LocalProvider) -> None:
    command = (sys.executable, "-c", "import sys; print('{port}', '$HOME'); sys.exit('no GPU was found')")

    async def run() -> Replica:
        await provider.start(spec("m-0", ReplicaWorkload(command=command)))
        return await until(provider, ReplicaState.FAILED)

    assert asyncio.run(run()).because == "the engine exited with code 1; its last line was: no GPU was found"


def test_port_goes_into_command_args_and_environment(provider: LocalProvider, tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        print(sys.argv[1:], os.environ["PORT"], os.environ["WHERE"], "FLEETGATE_CONTROL" in os.environ)"""
    workload = ReplicaWorkload(
        command=(sys.executable, "-c", script), args=("--port={port}",), env={"WHERE": "at {port}"}
    )
    os.environ["FLEETGATE_CONTROL"] = "private"

    async def run() -> Replica:
        await provider.start(spec("m-0", workload))
        return await until(provider, ReplicaState.FAILED)

    try:
        port = asyncio.run(run()).url.removeprefix("http://127.0.0.1:").removesuffix("/v1")
    finally:
        del os.environ["FLEETGATE_CONTROL"]
    assert (tmp_path / "engines" / "m-0.log").read_text() == f"['--port={port}'] {port} at {port} False\n"


@pytest.mark.parametrize(
    ("workload", "told"),
    [
        (ReplicaWorkload(image="vllm/vllm-openai"), "give workload.command"),
        (ReplicaWorkload(), "give workload.command"),
        (ReplicaWorkload(command=("/no/such/engine",)), "`/no/such/engine` cannot be run: No such file or directory"),
    ],
)
def test_an_operators_mistake_is_named(provider: LocalProvider, workload: ReplicaWorkload, told: str) -> None:
    with pytest.raises(BadSpec, match=told):
        asyncio.run(provider.start(spec("m-0", workload)))
    assert asyncio.run(provider.list()) == []


def test_a_fixed_port_that_is_taken_is_not_now(provider: LocalProvider) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        workload = ReplicaWorkload(command=ENGINE.command, port=taken.getsockname()[1])
        with pytest.raises(NotNow, match=r"workload\.port"):
            asyncio.run(provider.start(spec("m-0", workload)))


def test_state_and_logs_are_for_their_owner_only(provider: LocalProvider, tmp_path: Path) -> None:
    async def run() -> None:
        replica = await provider.start(spec("m-0", ENGINE))
        folder = tmp_path / "engines"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
            "m-0.json": 0o600,
            "m-0.log": 0o600,
        }
        await provider.stop(replica)
        assert list(folder.iterdir()) == []

    asyncio.run(run())


def test_the_reconciler_starts_what_crashed_again(provider: LocalProvider, tmp_path: Path) -> None:
    deployment = ManagedDeployment(
        name="m", cluster="here", provider="local", region="eu", workload=ENGINE, replicas_desired=2
    )
    desired = [deployment]
    told: list[str] = []

    async def run() -> None:
        reconciler = Reconciler(
            lambda: desired, {"local": provider}, lambda: None, lambda _kind, _name, sentence: told.append(sentence)
        )
        job = asyncio.create_task(reconciler.run())

        async def ready(count: int) -> tuple[str, ...]:
            await come(lambda: len(reconciler.endpoints().get("m", ())) == count)
            return reconciler.endpoints().get("m", ())

        await ready(2)
        victim = (await provider.list())[0]
        os.killpg(int(victim.ref), signal.SIGKILL)
        await ready(1)
        after = await ready(2)
        assert len(set(after)) == 2
        desired.clear()
        reconciler.wake()
        await ready(0)
        await come(lambda: not list((tmp_path / "engines").glob("*.json")))
        job.cancel()

    asyncio.run(run())
    assert any("was ended by SIGKILL" in sentence and "the next start is in 0.5 s" in sentence for sentence in told)
