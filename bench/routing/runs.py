"""Runs of the evaluation: windows of a trace at several loads, for every strategy, and their results."""

import sys
from collections.abc import Hashable, Iterable, Sequence
from copy import copy
from statistics import median

import msgspec

from fleetgate.core.routing.prefix_affinity import COLD, PrefixAffinity, WarmPrefix
from fleetgate.simulator.faults import SimulatedFault
from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.proxy_model import ProxyFleet
from fleetgate.simulator.report.score import slo_met
from fleetgate.simulator.serving.world import Arrival, Balancer, World
from fleetgate.simulator.simulation import Simulation, SimulationOutcome, SimulationSetting

WINDOW_SHARE = 0.5  # of the trace in one seed; seeds begin evenly spaced, so that they overlap


class Point(msgspec.Struct, frozen=True):
    """One run. Units: `worst_third` of the run's goodput as a share of the median third's; `case` steady or a fault."""

    trace: str
    case: str
    strategy: str
    load: float
    seed: int
    proxies: int
    goodput_ratio: float
    ttft_p50_s: float
    ttft_p99_s: float
    shed_share: float
    overcommit_max: float
    spill_ratio: float
    cost_usd_per_mtok: float | None
    worst_third: float


class Case(msgspec.Struct, frozen=True):
    """The settings of a run beside trace and load.

    Shape: `slow` names a Deployment that is 3 times slower for a while; without `affinity` engines have prefix caches,
    but proxies do not know which engine caches a prompt.
    """

    name: str
    strategies: tuple[str, ...]
    proxies: int = 1
    slow: str = ""
    affinity: bool = True


class NoAffinity(PrefixAffinity):
    """Finds no prompt."""

    def find(self, chain: Sequence[Hashable]) -> WarmPrefix:
        """No engine caches the prompt."""
        return COLD


class WithoutAffinity(Simulation):
    """The same simulation without prefix affinity in the proxies."""

    def _balancer(self, strategy: str, world: World) -> Balancer:
        balancer = super()._balancer(strategy, world)
        assert isinstance(balancer, ProxyFleet)
        for proxy in balancer.proxies:
            proxy.affinity = NoAffinity()
        return balancer


SLOW_FROM, SLOW_FOR, SLOW_FACTOR = 0.25, 0.375, 3.0  # of the run; 150 of 400 s


def window(arrivals: Sequence[Arrival], seed: int, seeds: int) -> list[Arrival]:
    """The part of a trace for one seed."""
    size = len(arrivals) if seeds == 1 else int(WINDOW_SHARE * len(arrivals))
    start = 0 if seeds == 1 else seed * (len(arrivals) - size) // (seeds - 1)
    chosen = [copy(arrival) for arrival in arrivals[start : start + size]]
    for index, arrival in enumerate(chosen):
        arrival.index = index
    return chosen


def run_case(
    fleet: SimulatedFleet, named: tuple[str, Sequence[Arrival]], case: Case, load: float, seed: int
) -> Iterable[Point]:
    """Every strategy of a case on one window."""
    name, arrivals = named
    setting = SimulationSetting(strategies=case.strategies, load=load, seed=seed, proxies=case.proxies)
    kind = Simulation if case.affinity else WithoutAffinity
    simulation = kind(fleet, arrivals, setting, lambda sentence: print(sentence, file=sys.stderr))
    if case.slow:
        span_s = simulation.trace[-1].at_s
        begins_s = SLOW_FROM * span_s
        fault = SimulatedFault("slow", case.slow, begins_s, begins_s + SLOW_FOR * span_s, SLOW_FACTOR)
        simulation.setting = msgspec.structs.replace(setting, faults=(fault,))
    for strategy in case.strategies:
        outcome = simulation.run(strategy)
        score = outcome.score
        yield Point(
            trace=name,
            case=case.name,
            strategy=strategy,
            load=load,
            seed=seed,
            proxies=case.proxies,
            goodput_ratio=score.goodput_ratio,
            ttft_p50_s=score.ttft_p50_s,
            ttft_p99_s=score.ttft_p99_s,
            shed_share=score.shed_share,
            overcommit_max=score.overcommit_max,
            spill_ratio=score.spill_ratio,
            cost_usd_per_mtok=score.cost_usd_per_mtok,
            worst_third=worst_third(simulation, outcome),
        )


def worst_third(simulation: Simulation, outcome: SimulationOutcome) -> float:
    """The share of work served inside the SLO in each third of the time: the worst over the median."""
    span_s = simulation.trace[-1].at_s
    offered, served = [1e-9] * 3, [0.0] * 3
    for arrival, work in zip(outcome.arrivals, simulation.work, strict=True):
        third = min(2, int(3 * arrival.at_s / span_s))
        offered[third] += work
        served[third] += work if all(slo_met(arrival, simulation.fleet)) else 0.0
    rates = [done / (span_s / 3) for done in served]
    return round(min(rates) / max(1e-9, median(rates)), 4)
