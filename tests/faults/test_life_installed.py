"""A version that is installed over a running earlier one: its supervisor starts the new code, and nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx2
import pytest

from tests.faults.life_load import Load
from tests.faults.test_accounts import rows_of
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway, kill
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent
EARLIER = "06dc9ac"  # the last version whose modules had other names
OLD_WORKER, OLD_CONTROL = "fleetgate.proxy.worker", "fleetgate.control.server"
STEP_S = 0.02  # of a stream's token
LONG_TOKENS = 900  # 18 s: the new workers serve before such a stream ends, and it ends before the drain does
# A process that imports the new package leaves its process id here: a child of the supervisor runs what it left.
STARTED = "FLEETGATE_TEST_STARTED"
MARK = f"""
import os as _os, pathlib as _pathlib
if "{STARTED}" in _os.environ:
    _pathlib.Path(_os.environ["{STARTED}"], str(_os.getpid())).touch()
"""


def source_of(revision: str, folder: Path) -> Path:
    """The sources of a revision, or a skip where the history is not here."""
    archive = subprocess.run(
        ["git", "archive", revision, "src", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if archive.returncode:
        pytest.skip(f"revision {revision} is not in this checkout: {archive.stderr.decode().strip()[:200]}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def this_source(folder: Path) -> Path:
    """A copy of the sources of this checkout, with the mark."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "src" / "fleetgate" / "__init__.py").open("a") as file:
        file.write(MARK)
    return folder


def pip(*words: str | Path) -> None:
    """Run pip with what is here, without an index."""
    argv = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


class Wheels:
    """The earlier version and this one, built."""

    def __init__(self, folder: Path) -> None:
        self.earlier = self._build(source_of(EARLIER, folder / "earlier-source"), folder / "earlier")
        self.this = self._build(this_source(folder / "this-source"), folder / "this")

    @staticmethod
    def _build(source: Path, folder: Path) -> Path:
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
        return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels(tmp_path_factory.mktemp("wheels"))


class Installed(Up):
    """A `fleetgate up` of the earlier version, over which this one is installed."""

    def __init__(self, folder: Path, wheels: Wheels, url: str) -> None:
        super().__init__(folder, [deployment("a", url), gateway("chat", "a", default=True)], "--auth", "none")
        self._wheels = wheels
        self.site = folder / "site"
        self.started = folder / "started"
        self.started.mkdir()
        self.env = {"PYTHONPATH": str(self.site), STARTED: str(self.started)}
        self._install(wheels.earlier)

    def _install(self, wheel: Path) -> None:
        pip("install", "--no-deps", "--no-index", "--upgrade", "--target", self.site, wheel)

    def upgrade_files(self) -> None:
        """Install this version over the earlier one, whose processes go on."""
        before = self.workers, self.control
        self._install(self._wheels.this)
        assert not (self.site / "fleetgate" / "running.py").exists(), "the earlier version is still there"
        assert (self.workers, self.control) == before
        assert len(self.workers) == 2 and len(self.control) == 1
        assert not self.new_code, "a process of this version ran already"

    @property
    def workers(self) -> set[int]:
        """The process ids of the workers, by the name that the earlier supervisor starts them with."""
        return set(self.children(OLD_WORKER))

    @property
    def control(self) -> set[int]:
        """The process id of the control process, by its old name."""
        return set(self.children(OLD_CONTROL))

    @property
    def new_code(self) -> set[int]:
        """The processes that run, or ran, this version."""
        return {int(path.name) for path in self.started.iterdir()}

    def in_flight(self) -> float:
        """The requests in flight by the metrics, -1 while the control process does not answer."""
        try:
            text = httpx2.get(f"{self.api}/metrics", trust_env=False).text
        except httpx2.TransportError:
            return -1
        return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith("fleetgate_in_flight{"))

    def freeze(self, worker: int) -> set[int]:
        """Stop a worker in the middle of its work; the clients' ports of the connections that it has accepted."""
        os.kill(worker, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        held = {str(fd.readlink()) for fd in Path(f"/proc/{worker}/fd").iterdir()}
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ours = f":{self.port:04X}"
        return {int(row[2][-4:], 16) for row in rows if row[1].endswith(ours) and f"socket:[{row[9]}]" in held}


@contextmanager
def earlier(folder: Path, wheels: Wheels) -> Iterator[Installed]:
    """The earlier version, running over a simulated engine."""
    speed = ("--prefill-tokens-per-s", "0", "--decode-base-s", str(STEP_S), "--decode-per-sequence-s", "0")
    with (
        engine("--model", "m", "--output-tokens", str(LONG_TOKENS), *speed) as url,
        Installed(folder, wheels, url) as up,
    ):
        yield up


def wait_for_answers(load: Load, count: int) -> None:
    """Until so many more answers came."""
    good = load.good
    wait_for(lambda: load.good >= good + count)


def check_books(up: Installed, good: int, lost_max: int) -> None:
    """Each answer has its row, whichever version wrote it, and no slot is held for a request that is over."""
    wait_for(lambda: up.in_flight() == 0)
    wait_for(lambda: sum(row.outcome == "ok" for row in rows_of(up)) >= good)
    rows = rows_of(up)
    assert len({row.attempt_id for row in rows}) == len(rows)
    assert good <= sum(row.outcome == "ok" for row in rows) <= len(rows) <= good + lost_max


def test_an_installed_earlier_version_reloads_into_this_one(tmp_path: Path, wheels: Wheels) -> None:
    with earlier(tmp_path, wheels) as up, Load(up.port, short=4, streams=8) as load:
        wait_for_answers(load, 20)
        up.upgrade_files()
        workers, control = up.workers, up.control
        long = Load(up.port, short=0, streams=6)
        long.stream_tokens = LONG_TOKENS
        with long:
            wait_for(lambda: up.in_flight() >= 6)
            told = up.cli("reload")
            assert told.returncode == 0, told.stderr
            assert not long.outcomes, "a long stream ended before the new workers served"
            assert up.workers & workers and len(up.workers & up.new_code) == 2
            long.stop()
        assert long.good >= 6 and not long.bad, long.bad
        wait_for(lambda: not workers & up.workers and not control & up.control)
        wait_for(up.is_ready)
        wait_for_answers(load, 50)
        load.stop()
        assert not load.bad, load.bad
        assert len(up.workers) == 2 and len(up.control) == 1 and up.workers | up.control <= up.new_code
        assert up.process.pid not in up.new_code, "the supervisor is still the earlier version"
        check_books(up, load.good + long.good, 0)


def test_workers_that_crash_are_replaced_by_this_version_while_requests_run(tmp_path: Path, wheels: Wheels) -> None:
    """First beside a worker and a control process of the earlier version, at last beside this version alone."""
    with earlier(tmp_path, wheels) as up, Load(up.port, 6, 10) as load, Load(up.port, 2, 0) as connecting:
        connecting.reconnects = True  # some of its connections wait in the backlog of a worker that is gone
        wait_for_answers(load, 20)
        up.upgrade_files()
        on_killed: set[int] = set()
        for kept_old in (1, 0, 0):
            victim = min(up.workers - up.new_code or up.workers)
            held = up.freeze(victim)
            kill(victim)
            assert held, "the worker had clients"
            on_killed |= held
            wait_for(lambda victim=victim: victim not in up.workers and len(up.workers) == 2)  # type: ignore[misc]
            wait_for(lambda: len(up.workers & up.new_code) >= 2 - kept_old)  # noqa: B023
            wait_for(up.is_ready)
            wait_for_answers(load, 50)
            bad = load.bad | connecting.bad
            assert load.lost | connecting.lost <= on_killed, f"lost without having been on a killed worker: {bad}"
            assert len(up.workers - up.new_code) == kept_old
        assert not up.control & up.new_code
        kill(min(up.control))
        wait_for(lambda: bool(up.control) and up.control <= up.new_code)
        wait_for(up.is_ready)
        wait_for_answers(load, 50)
        load.stop()
        connecting.stop()
        assert load.lost | connecting.lost <= on_killed, load.bad | connecting.bad
        assert sum(load.bad.values()) + sum(connecting.bad.values()) <= len(on_killed)
        check_books(up, load.good + connecting.good, 2 * len(on_killed))
