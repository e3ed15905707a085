"""`python -m bench.routing --traces DIR`: routing and admission over public traces, beside the baselines.

Seeds are overlapping halves of each trace, evenly spaced; every figure is the median over the seeds with its range.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from bench.routing.bars import Findings, bars
from bench.routing.runs import Case, Point, run_case, window
from fleetgate.control.snapshot.offline import read_fleet
from fleetgate.core.routing import strategies
from fleetgate.simulator.baselines.registry import BASELINES
from fleetgate.simulator.fleet import SimulatedFleet, fleet_of
from fleetgate.simulator.serving.world import Arrival
from fleetgate.simulator.traces import read_trace

HERE = Path(__file__).parent
TUNED = """
Tuning: the width of the window over which prompts count (18 tokens at the TPOT target), the start of the margin (1.2)
and the number of waiting requests tried at once (4) were chosen on the first 8,000 and 10,000 requests of the
conversation trace at loads 0.85 to 1.2, on a fleet of 36 replicas of the same three speeds. Two rules were found on
the Mooncake trace, which has long prompts: a request's own prompt counts for at most 0.6 of the headroom against its
own TPOT, so that it is not refused because of its length; and a request that would delay the responses already
running goes to another Deployment if one is available. The fleet's L40S-like speeds and all prices are invented; the
ratios of the other speeds follow published measurements.
"""
TRACES = {"conv": "azure_llm_2023_conv.csv.gz", "mooncake": "mooncake_synthetic.csv.gz"}
SHORT_OUTPUTS = ("mooncake",)
LOADS = "0.5,0.7,0.85,1.0,1.1,1.2,1.5"
LARGEST = "h100-1"
SHOWN = (
    "goodput_ratio",
    "ttft_p50_s",
    "ttft_p99_s",
    "shed_share",
    "overcommit_max",
    "spill_ratio",
    "cost_usd_per_mtok",
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench.routing", description=__doc__)
    parser.add_argument("--traces", type=Path, required=True, help="folder with the traces")
    parser.add_argument(
        "--trace", default=",".join(TRACES), help="names of traces, comma-separated; name=FILE for others"
    )
    parser.add_argument("--fleet", type=Path, default=HERE / "fleet.yaml")
    parser.add_argument("--loads", default=LOADS)
    parser.add_argument("--strategies", default=",".join([*strategies.names(), *BASELINES]))
    parser.add_argument("--subject", default="capacity_round_robin", help="the strategy compared with the bars")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=0, help="only the first N requests of a trace")
    parser.add_argument("--steady", action="store_true", help="run only the steady case")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="number of processes")
    parser.add_argument("--out", type=Path, default=None, help="write every run as JSON")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md instead of printing it")
    return parser.parse_args(argv)


def cases(options: argparse.Namespace, has_prefixes: bool) -> list[tuple[Case, list[float]]]:
    """The cases with their loads."""
    loads = [float(load) for load in options.loads.split(",")]
    chosen = [(Case("steady", tuple(options.strategies.split(","))), loads)]
    if not options.steady:
        chosen.append((Case("slow", (options.subject, "static_weights"), slow=LARGEST), [0.7]))
        chosen.append((Case("proxies", (options.subject,), proxies=4), [1.2]))
        if has_prefixes:
            chosen.append((Case("no affinity", (options.subject,), affinity=False), [0.7]))
    return chosen


class Job(NamedTuple):
    """The unit of work of a process: every strategy of a case, at one load, on one window."""

    fleet: SimulatedFleet
    name: str
    file: Path
    limit: int
    case: Case
    load: float
    seed: int
    seeds: int


@cache
def trace_of(file: Path, limit: int) -> list[Arrival]:
    """A trace, read once in each process."""
    return read_trace(file, limit)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Every job to run."""
    fleet = fleet_of(read_fleet(str(options.fleet)))
    for part in options.trace.split(","):
        name, _, file = part.partition("=")
        path = options.traces / (file or TRACES[name])
        has_prefixes = any(arrival.blocks for arrival in trace_of(path, options.limit))
        for case, loads in cases(options, has_prefixes):
            for load in loads:
                for seed in range(options.seeds):
                    yield Job(fleet, name, path, options.limit, case, load, seed, options.seeds)


def run_job(job: Job) -> list[Point]:
    """Run a job in its own process; it writes a line to standard error after each run."""
    part = window(trace_of(job.file, job.limit), job.seed, job.seeds)
    points, began_s = [], time.perf_counter()
    for point in run_case(job.fleet, (job.name, part), job.case, job.load, job.seed):
        took_s, began_s = time.perf_counter() - began_s, time.perf_counter()
        result = f"{point.goodput_ratio:.3f} ({took_s:.1f} s)"
        sys.stderr.write(f"{point.trace} {point.case} {point.load:g} seed {point.seed} {point.strategy} {result}\n")
        points.append(point)
    return points


def measure(options: argparse.Namespace) -> list[Point]:
    """Every run, in an order that does not depend on the number of processes."""
    with ProcessPoolExecutor(options.jobs) as pool:
        return [point for points in pool.map(run_job, jobs(options)) for point in points]


def markdown(points: Sequence[Point], subject: str) -> str:
    """The tables of a report: medians with their range, then the bars."""
    lines: list[str] = []
    runs = dict.fromkeys((point.trace, point.case, point.load) for point in points)
    for trace, case, load in runs:
        lines += [f"\n**{trace}, {case}, load {load:g}**\n", f"| strategy | {' | '.join(SHOWN)} |", "|---" * 8 + "|"]
        same = [point for point in points if (point.trace, point.case, point.load) == (trace, case, load)]
        for strategy in dict.fromkeys(point.strategy for point in same):
            cells = [
                _spread([getattr(point, field) for point in same if point.strategy == strategy]) for field in SHOWN
            ]
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
    found = Findings(points)
    for trace in dict.fromkeys(point.trace for point in points):
        lines += [
            f"\n**{trace}: {subject} against the bars**\n",
            "| figure | measured | bar | met |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {sentence} | {value:.3f} | {bar:g} | {'yes' if met else 'no'} |"
            for sentence, value, bar, met in bars(found, subject, trace, trace in SHORT_OUTPUTS)
        ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.3f} [{min(known):.3f}–{max(known):.3f}]" if known else "–"


def preface(options: argparse.Namespace, points: Sequence[Point]) -> str:
    """The settings of the report, so that it can be reproduced."""
    counts = f"the first {options.limit:,} requests" if options.limit else "all requests"
    seeds = len({point.seed for point in points})
    half = " (overlapping halves, evenly spaced)" if seeds > 1 else ""
    return (
        "# Routing and admission, simulated\n\n"
        f"`python -m bench.routing --traces DIR --write` over `bench/routing/fleet.yaml`: {counts} of each trace, "
        f"{seeds} windows{half}, medians with their range. Loads and goodput are shares of what the Deployments serve "
        "of that window, each measured alone at steady arrivals. One setting for all traces. "
        "The built-in baselines run without admission; the clairvoyant knows every output length.\n" + TUNED
    )


def main() -> int:
    """Measure, and print or write the report."""
    options = arguments()
    points = measure(options)
    if options.out is not None:
        options.out.write_text(json.dumps(msgspec.to_builtins(points), indent=1) + "\n")
    text = preface(options, points) + markdown(points, options.subject)
    if options.write:
        (HERE / "RESULTS.md").write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
