"""The source of another commit, so that two versions can run beside each other."""

import subprocess
from pathlib import Path

from bench.native import CannotBench

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"


def extract(revision: str, folder: Path) -> Path:
    """Write `src` of a commit into a folder and return its path, for `PYTHONPATH`.

    Raises: `CannotBench` when Git does not know the commit.
    """
    folder.mkdir(parents=True)
    archive = folder / "src.tar"
    for argv in (
        ["git", "-C", str(ROOT), "archive", "--output", str(archive), revision, "src"],
        ["tar", "-x", "-f", str(archive), "-C", str(folder)],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotBench(f"the source of {revision} cannot be read: {done.stderr.strip()}")
    archive.unlink()
    return folder / "src"


def describe(revision: str) -> str:
    """The short name of a commit, as results are labelled with it."""
    argv = ["git", "-C", str(ROOT), "rev-parse", "--short", f"{revision}^{{commit}}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBench(f"{revision} is not a commit of this repository: {done.stderr.strip()}")
    return done.stdout.strip()
