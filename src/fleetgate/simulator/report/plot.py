"""Two plots of a simulation: the distribution of TTFT, and goodput over time.

It needs matplotlib (the extra `plot`), and is imported only for `--plot`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.report.score import slo_met
from fleetgate.simulator.serving.world import Arrival

BUCKETS = 60  # of the time axis
TTFT_SHOWN_S_MIN = 0.01


def draw(path: Path, fleet: SimulatedFleet, work: Sequence[float], runs: Mapping[str, Sequence[Arrival]]) -> None:
    """Write an SVG or PNG. Shape: `runs` has every strategy's arrivals, `work` the work of each arrival."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for strategy, arrivals in runs.items():
        ttfts = sorted(a.first_s - a.at_s for a in arrivals if a.ended_s >= 0.0)
        shares = [(rank + 1) / len(arrivals) for rank in range(len(ttfts))]
        left.plot([max(TTFT_SHOWN_S_MIN, ttft_s) for ttft_s in ttfts], shares, label=strategy)
        span_s = max(1e-9, arrivals[-1].at_s)
        sums = [0.0] * BUCKETS
        for arrival, weight in zip(arrivals, work, strict=True):
            if all(slo_met(arrival, fleet)):
                sums[min(BUCKETS - 1, int(BUCKETS * arrival.at_s / span_s))] += weight
        width_s = span_s / BUCKETS
        right.plot([(n + 0.5) * width_s for n in range(BUCKETS)], [total / width_s for total in sums], label=strategy)
    left.set(xscale="log", xlabel="TTFT (s)", ylabel="share of all requests", ylim=(0, 1), title="First token")
    right.set(xlabel="arrival (s)", ylabel="work inside the SLO (mean requests/s)", ylim=(0, None), title="Goodput")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(loc="lower right", fontsize="small")
    # A fixed salt and no date: the file is the same in every run.
    with mpl.rc_context({"svg.hashsalt": "fleetgate"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
