"""`python -m bench.routing --traces DIR`: routing and admission over public traces, beside the built-in baselines.

Seeds are overlapping halves of each trace, evenly spaced; every figure is the median over them with its range.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from bench.routing.bars import Findings, bars
from bench.routing.runs import Case, Point, run_case, window
from fleetgate.control.paper import read_fleet
from fleetgate.core import strategies
from fleetgate.simulator.baselines import BASELINES
from fleetgate.simulator.fleet import fleet_of
from fleetgate.simulator.traces import read_trace

HERE = Path(__file__).parent
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
        "--trace", default=",".join(TRACES), help="which of them, comma-separated; name=FILE for others"
    )
    parser.add_argument("--fleet", type=Path, default=HERE / "fleet.yaml")
    parser.add_argument("--loads", default=LOADS)
    parser.add_argument("--strategies", default=",".join([*strategies.names(), *BASELINES]))
    parser.add_argument("--subject", default="capacity_round_robin", help="whose figures are held against the bars")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=0, help="only the first N requests of a trace")
    parser.add_argument("--steady", action="store_true", help="leave out the slow Deployment and the four proxies")
    parser.add_argument("--out", type=Path, default=None, help="write every run as JSON")
    return parser.parse_args(argv)


def cases(options: argparse.Namespace) -> list[tuple[Case, list[float]]]:
    """What is run at which loads."""
    loads = [float(load) for load in options.loads.split(",")]
    chosen = [(Case("steady", tuple(options.strategies.split(","))), loads)]
    if not options.steady:
        chosen.append((Case("slow", (options.subject, "static_weights"), slow=LARGEST), [0.7]))
        chosen.append((Case("proxies", (options.subject,), proxies=4), [1.2]))
    return chosen


def measure(options: argparse.Namespace) -> list[Point]:
    """Every run; a line on standard error tells of each as it ends."""
    fleet = fleet_of(read_fleet(str(options.fleet)))
    points = []
    for mark in options.trace.split(","):
        name, _, file = mark.partition("=")
        arrivals = read_trace(options.traces / (file or TRACES[name]), options.limit)
        for case, loads in cases(options):
            for load in loads:
                for seed in range(options.seeds):
                    part, began_s = window(arrivals, seed, options.seeds), time.perf_counter()
                    for point in run_case(fleet, (name, part), case, load, seed):
                        took_s, began_s = time.perf_counter() - began_s, time.perf_counter()
                        told = f"{point.goodput_ratio:.3f} ({took_s:.1f} s)"
                        sys.stderr.write(f"{name} {case.name} {load:g} seed {seed} {point.strategy} {told}\n")
                        points.append(point)
    return points


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


def main() -> int:
    """Measure and tell."""
    options = arguments()
    points = measure(options)
    if options.out is not None:
        options.out.write_text(json.dumps(msgspec.to_builtins(points), indent=1) + "\n")
    sys.stdout.write(markdown(points, options.subject))
    return 0


if __name__ == "__main__":
    sys.exit(main())
