"""The required figures, each with its measured value."""

from collections.abc import Sequence
from statistics import median

from bench.routing.runs import Point

CARRIED_SHARE = 0.9  # of the work inside the SLO, for a load to count as carried


class Findings:
    """All runs, with medians over the seeds."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points

    def values(self, field: str, strategy: str, load: float, trace: str, case: str = "steady") -> list[float]:
        """One figure of every seed."""
        return [
            getattr(point, field)
            for point in self.points
            if (point.strategy, point.load, point.trace, point.case) == (strategy, load, trace, case)
        ]

    def median(self, field: str, strategy: str, load: float, trace: str, case: str = "steady") -> float:
        """The median of a figure; NaN if it was not run, so that it meets no bar."""
        found = self.values(field, strategy, load, trace, case)
        return median(found) if found else float("nan")

    def loads(self, trace: str) -> list[float]:
        """The loads that were run, in ascending order."""
        return sorted({point.load for point in self.points if point.trace == trace and point.case == "steady"})

    def carried(self, strategy: str, trace: str) -> float:
        """The largest load up to which at least 90 % of the work is inside the SLO at every load; 0 for none."""
        largest = 0.0
        for load in self.loads(trace):
            if not self.median("goodput_ratio", strategy, load, trace) >= CARRIED_SHARE * load:
                break
            largest = load
        return largest

    def ratio(self, field: str, one: tuple[str, float, str, str], other: tuple[str, float, str, str]) -> float:
        """One median over another."""
        below = self.median(field, *other)
        return self.median(field, *one) / below if below else float("inf")


def bars(found: Findings, strategy: str, trace: str, short_outputs: bool) -> list[tuple[str, float, float, bool]]:
    """Sentence, measured value, bar, and whether it is met; a bar without runs is not met."""
    steady = "steady"

    def against(other: str, load: float, field: str = "goodput_ratio", case: str = steady) -> float:
        return found.ratio(field, (strategy, load, trace, case), (other, load, trace, case))

    def at_least(sentence: str, value: float, bar: float) -> tuple[str, float, float, bool]:
        return sentence, value, bar, value >= bar

    def at_most(sentence: str, value: float, bar: float) -> tuple[str, float, float, bool]:
        return sentence, value, bar, value <= bar

    def own(field: str, load: float, case: str = steady) -> float:
        return found.median(field, strategy, load, trace, case)

    near = 0.9 if short_outputs else 0.95
    several = found.ratio("goodput_ratio", (strategy, 1.2, trace, "proxies"), (strategy, 1.2, trace, steady))
    lines = [
        at_least("largest load with 90 % of the work inside the SLO", found.carried(strategy, trace), 1.1),
        at_least("goodput at 0.7 over round robin's", against("round_robin", 0.7), 1.2),
        at_least("goodput at 1.2", own("goodput_ratio", 1.2), 0.95),
        at_least("goodput at 1.2 over least outstanding's", against("least_outstanding", 1.2), 1.5),
        at_least("worst third of the time at 1.2 over the median third", own("worst_third", 1.2), 0.85),
        at_most("p50 TTFT at 0.5 over round robin's", against("round_robin", 0.5, "ttft_p50_s"), 0.6),
        at_least(
            "goodput at 0.7 over static weights', largest Deployment 3 x slower",
            against("static_weights", 0.7, case="slow"),
            1.2,
        ),
        at_least("goodput of 4 proxies at 1.2 over one's", several, 0.97),
        at_most("over-admission of 4 proxies at 1.2", own("overcommit_max", 1.2, "proxies"), 0.02),
    ]
    if found.values("ttft_p50_s", strategy, 0.7, trace, "no affinity"):
        cold = (strategy, 0.7, trace, "no affinity")
        ratio = found.ratio("ttft_p50_s", (strategy, 0.7, trace, steady), cold)
        lines.append(("p50 TTFT at 0.7 over the same without affinity", ratio, 1.0, ratio < 1.0))
    return lines + [
        at_least(f"goodput at {load:g} over the clairvoyant's", against("clairvoyant", load), near)
        for load in found.loads(trace)
    ]
