"""A version that is installed over a running earlier one: its supervisor starts the new code, and nothing is lost."""

import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.faults.life_load import Load
from tests.loopback.engines import engine
from tests.loopback.up_rig import Up, deployment, gateway, kill
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent
EARLIER = "06dc9ac"  # the last version whose modules had other names
OLD_WORKER, OLD_CONTROL = "fleetgate.proxy.worker", "fleetgate.control.server"


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


def install(source: Path, site: Path) -> None:
    """Install a source tree into a folder, over what is there."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run(
        [*pip, "--no-build-isolation", "--upgrade", "--target", str(site), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_an_installed_earlier_version_reloads_into_this_one(tmp_path: Path) -> None:
    site, this = tmp_path / "site", tmp_path / "this"
    install(source_of(EARLIER, tmp_path / "earlier"), site)
    this.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, this / name)
    shutil.copytree(ROOT / "src", this / "src", ignore=shutil.ignore_patterns("__pycache__"))
    speed = ("--prefill-tokens-per-s", "0", "--decode-base-s", "0.02", "--decode-per-sequence-s", "0")
    with engine("--model", "m", *speed) as url:
        up = Up(tmp_path, [deployment("a", url), gateway("chat", "a", default=True)], "--auth", "none")
        up.env = {"PYTHONPATH": str(site)}
        with up, Load(up.port, short=4, streams=4) as load:
            wait_for(lambda: load.good > 20)
            install(this, site)
            assert not (site / "fleetgate" / "running.py").exists(), "the earlier version is still there"
            workers, control = set(up.children(OLD_WORKER)), set(up.children(OLD_CONTROL))
            assert len(workers) == 2 and len(control) == 1
            told = up.cli("reload")
            assert told.returncode == 0, told.stderr
            wait_for(lambda: not (workers & set(up.children(OLD_WORKER)) or control & set(up.children(OLD_CONTROL))))
            wait_for(up.is_ready)
            good = load.good
            wait_for(lambda: load.good > good + 50)
            load.stop()
            assert not load.bad, load.bad
            # Nothing is under way: what comes after the kill must all be answered, by the other worker or by the next.
            before = set(up.children(OLD_WORKER))
            kill(min(before))
            assert [up.ask().status_code for _ in range(40)] == [200] * 40
            wait_for(lambda: len(set(up.children(OLD_WORKER))) == 2 and min(before) not in up.children(OLD_WORKER))
            wait_for(up.is_ready)
            assert [up.ask().status_code for _ in range(20)] == [200] * 20
