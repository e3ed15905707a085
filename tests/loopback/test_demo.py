"""The demo as its users run it, and its fleet file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fleetgate.control.resources.config_file import check_file
from fleetgate.demo.fleet import REGIONS, documents

ROOT = Path(__file__).parent.parent.parent


def test_the_fleet_file_has_no_mistakes(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text(yaml.safe_dump_all(documents()))
    assert check_file(str(config), tmp_path / "data") == []


@pytest.mark.timeout(400)
def test_the_tour_holds_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = "import sys; from fleetgate.demo.command import run_demo; sys.exit(run_demo(True, None))"
    marked = {**os.environ, "TMPDIR": str(tmp_path), "DEMO_UNDER_TEST": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=marked
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(region in run.stdout for region in REGIONS)
    assert "Every claim of the tour holds." in run.stdout
    assert list(tmp_path.iterdir()) == []
    assert not _marked_processes(str(tmp_path))


def test_what_is_missing_is_one_sentence() -> None:
    script = (
        "import sys; sys.modules['openai'] = None; "
        "from fleetgate.demo.command import run_demo; sys.exit(run_demo(True, None))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stderr == "the demo needs the official SDK (the package openai); run `make setup`\n"


def _marked_processes(mark: str) -> list[str]:
    """Processes that were started by the demo under test and still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"DEMO_UNDER_TEST={mark}".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue  # it has ended, or belongs to somebody else
    return found
