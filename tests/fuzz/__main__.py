"""`python -m tests.fuzz [TARGET ...] [--inputs N] [--seed S] [--first N]`: fuzzing, as long as you like."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.bodies import Bodies
from tests.fuzz.edge import Edge
from tests.fuzz.resumes import Resumes
from tests.fuzz.snapshots import Snapshots
from tests.fuzz.streams import Streams
from tests.fuzz.target import Target, attack

TELL_EVERY_S = 10.0
TARGETS: dict[str, Callable[[Path], Target]] = {
    "edge": Edge,
    "streams": Streams,
    "bodies": lambda data_dir: Bodies(),
    "snapshots": lambda data_dir: Snapshots(),
    "resumes": lambda data_dir: Resumes(),
}


def run(name: str, seed: int, numbers: range, found_max: int) -> int:
    """Attack one target; how many inputs did what they must not."""
    began_s = told_s = time.monotonic()

    def tell(number: int) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= TELL_EVERY_S:
            told_s = now_s
            done = number - numbers.start + 1
            print(f"{name}: {done:,} of {len(numbers):,}, {done / (now_s - began_s):,.0f} inputs/s", flush=True)

    with tempfile.TemporaryDirectory(prefix="fleetgate-fuzz-") as directory:
        found = attack(TARGETS[name](Path(directory)), seed, numbers, tell, found_max)
    spent_s = time.monotonic() - began_s
    for one in found:
        print(one, flush=True)
    rate = len(numbers) / spent_s
    verdict = f"{len(found)} found" if found else "nothing found"
    print(f"{name}: {len(numbers):,} inputs of seed {seed}, {rate:,.0f}/s: {verdict}", flush=True)
    return len(found)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all of them")
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--found-max", type=int, default=5, help="stop a target after so many")
    asked = parser.parse_args()
    numbers = range(asked.first, asked.first + asked.inputs)
    return sum(run(name, asked.seed, numbers, asked.found_max) for name in asked.targets or TARGETS) and 1


if __name__ == "__main__":
    sys.exit(main())
