"""`python -m bench --against REV`: does this tree cost more per request or streamed event than an earlier commit?

Each pair starts both versions anew, so that the interval includes what differs from process to process, and measures
them one after the other; the order changes from pair to pair (A B, B A, …), so that a machine that drifts slows both.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.machine import cores_for
from bench.measure import KINDS, Scale, Target
from bench.native import Mock, alone, build
from bench.peers.base import Site
from bench.peers.fleetgate import Fleetgate
from bench.revision import SOURCE, describe, extract

RATIO_MAX = 1.05  # the interval of the cost ratio must lie under this
PAIRS = 20
AGAINST_KINDS = ("request", "event")
SCALE = Scale(warm_s=0.7, window_s=1.5, stream_window_s=2.0)
# Two-sided 95 % quantiles of Student's t by degrees of freedom, from 1; beyond the table 1.96 + 2.4/n is within 0.002.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Comparison(NamedTuple):
    """What the pairs say. Shape: `ratio` is this tree ÷ the earlier commit; `low` and `high` bound it with 95 %."""

    median_before: float
    median_now: float
    ratio: float
    low: float
    high: float


def compare(before: Sequence[float], now: Sequence[float]) -> Comparison:
    """The ratio of paired costs and its interval, by Student's t on the logarithms.

    Raises: `ValueError` for fewer than two pairs.
    """
    logs = [math.log(b / a) for a, b in zip(before, now, strict=True)]
    if len(logs) < 2:
        raise ValueError("an interval needs at least two pairs")
    freedom = len(logs) - 1
    quantile = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 + 2.4 / freedom
    mean, half = statistics.fmean(logs), quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return Comparison(
        statistics.median(before), statistics.median(now), math.exp(mean), math.exp(mean - half), math.exp(mean + half)
    )


class Comparer:
    """The mock, the two source trees, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self.options = options
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetgate-against-")))
        self.cores = cores_for(1)
        self.mock = Mock(self.cores)
        stack.callback(self.mock.close)
        self.sides = {describe(options.against): extract(options.against, self.folder / "rev"), "this tree": SOURCE}
        self.costs: dict[str, dict[str, list[float]]] = {
            kind: {side: [] for side in self.sides} for kind in options.only
        }

    def measure_pair(self, number: int, progress: Progress) -> None:
        """Start both versions, measure each kind on both, stop them."""
        order = list(self.sides) if number % 2 == 0 else list(reversed(self.sides))
        with ExitStack() as stack:
            targets = {side: self._start(side, number, stack) for side in order}
            for kind in self.options.only:
                for side in order:
                    progress.update(progress.task_ids[0], description=f"{kind}: {side}")
                    self.costs[kind][side].append(KINDS[kind](targets[side], SCALE)["cpu_us"])
                    progress.advance(progress.task_ids[0])

    def _start(self, side: str, number: int, stack: ExitStack) -> Target:
        folder = self.folder / f"{number}-{side.replace(' ', '-')}"
        folder.mkdir()
        running = Fleetgate(self.sides[side]).start(Site(folder, self.mock.port, self.cores, 1, None))
        stack.callback(running.stop)
        return Target(running, 0, True, False, folder, self.options.head, self.cores)

    def table(self) -> tuple[Table, bool]:
        """The results for people, and whether every interval lies under the limit."""
        columns = [f"{side}, µs" for side in self.sides]
        table = Table("CPU per", *columns, "ratio", "95 % interval", f"under {RATIO_MAX}", title=self._title())
        passed = True
        for kind, costs in self.costs.items():
            found = compare(*costs.values())
            under = found.high < RATIO_MAX
            passed = passed and under
            table.add_row(
                kind,
                f"{found.median_before:.1f}",
                f"{found.median_now:.1f}",
                f"{found.ratio:.3f}",
                f"{found.low:.3f} to {found.high:.3f}",
                "yes" if under else "NO",
            )
        return table, passed

    def _title(self) -> str:
        return f"medians of {self.options.pairs} interleaved pairs; ratio: this tree ÷ {next(iter(self.sides))}"


def run(options: argparse.Namespace, console: Console) -> int:
    """Measure and print; 0 when this tree costs less than the limit with 95 % confidence, else 1."""
    with ExitStack() as stack:
        stack.enter_context(alone())
        build()
        comparer = Comparer(options, stack)
        columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            progress.add_task("", total=options.pairs * len(options.only) * 2)
            for number in range(options.pairs):
                comparer.measure_pair(number, progress)
                if not console.is_terminal:
                    progress.print(f"pair {number + 1} of {options.pairs}")
        table, passed = comparer.table()
    console.print(table)
    return 0 if passed else 1
