"""Runs of one trace over one fleet: scale the load, assign regions, run each strategy, compute its score."""

from collections.abc import Callable, Sequence
from copy import copy
from random import Random

import msgspec

from fleetgate.core.routing import strategies
from fleetgate.simulator.baselines.base import BaselineInputs
from fleetgate.simulator.baselines.registry import BASELINES
from fleetgate.simulator.faults import SimulatedFault, schedule_faults
from fleetgate.simulator.fleet import SimulatedFleet, engines_of
from fleetgate.simulator.proxy_model import ProxyFleet
from fleetgate.simulator.region_phases import assign_proxies, assign_regions
from fleetgate.simulator.region_rtt import RegionRtts
from fleetgate.simulator.report.score import RunSetting, Score, score
from fleetgate.simulator.serving.world import Arrival, Balancer, World
from fleetgate.simulator.trace_capacity import capacities_rps, work_of


class NotPossible(Exception):
    """The simulation cannot run with these settings; the message gives the reason and the fix."""


class SimulationSetting(msgspec.Struct, frozen=True, kw_only=True):
    """The settings beside fleet and trace.

    Units: `load` is a share of the fleet's capacity for this trace, `rate_rps` requests/s; without both the trace
    keeps its own times. Shape: `phases` maps regions to hours; `proxies` 0 means one for each region of the trace.
    """

    strategies: tuple[str, ...]
    load: float | None = None
    rate_rps: float | None = None
    seed: int = 0
    proxies: int = 0
    phases: dict[str, float] = {}
    faults: tuple[SimulatedFault, ...] = ()


class SimulationOutcome(msgspec.Struct, frozen=True):
    """A finished run: its score, every arrival for plots, and the changes of limits as sentences."""

    score: Score
    arrivals: Sequence[Arrival]
    changes: Sequence[str]


class Simulation:
    """One fleet, one trace and one setting, ready to run any strategy on the same arrivals."""

    def __init__(
        self,
        fleet: SimulatedFleet,
        trace: Sequence[Arrival],
        setting: SimulationSetting,
        warn: Callable[[str], None],
        progress: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.fleet = fleet
        self.setting = setting
        self._rtts = RegionRtts(warn)
        self.capacities = capacities_rps(fleet, trace, setting.seed, progress)
        self.capacity_rps = sum(self.capacities.values())
        if self.capacity_rps <= 0.0:
            raise NotPossible(
                "no Deployment serves any request of this trace inside the SLO, even when idle; "
                "loosen `slo` or use faster Profiles"
            )
        self.work = work_of(trace)
        self.trace = self._scaled(trace)
        self.load = round(len(trace) / max(1e-9, self.trace[-1].at_s) / self.capacity_rps, 4)
        self.proxy_regions = self._proxies()
        near = {region: self._near(region) for region in dict.fromkeys(arrival.region for arrival in self.trace)}
        assign_proxies(self.trace, near, Random(setting.seed + 2))

    def run(self, strategy: str, progress: Callable[[int], None] = lambda done: None) -> SimulationOutcome:
        """Run one strategy, of the product or a built-in comparison, over all arrivals."""
        arrivals = [copy(arrival) for arrival in self.trace]
        world = World(engines_of(self.fleet, self.proxy_regions, self._rtts), self.proxy_regions)
        world.balancer = balancer = self._balancer(strategy, world)
        schedule_faults(self.setting.faults, self.fleet, world)
        world.run(arrivals, progress)
        run = RunSetting(strategy, self.load, self.setting.seed, self.capacity_rps, self.work)
        return SimulationOutcome(score(run, self.fleet, arrivals, world), arrivals, getattr(balancer, "changes", ()))

    def _balancer(self, strategy: str, world: World) -> Balancer:
        if strategy in BASELINES:
            return BASELINES[strategy](world, BaselineInputs(self.fleet, self.capacities))
        return ProxyFleet(world, self.fleet, strategy)

    def _scaled(self, trace: Sequence[Arrival]) -> list[Arrival]:
        arrivals = [copy(arrival) for arrival in trace]
        began_s = arrivals[0].at_s
        span_s = arrivals[-1].at_s - began_s
        rate_rps = self.setting.rate_rps
        if self.setting.load is not None:
            rate_rps = self.setting.load * self.capacity_rps
        if rate_rps is not None and span_s <= 0.0:
            raise NotPossible("all requests of the trace arrive at once, so no load can be set; omit --load and --rate")
        stretch = len(arrivals) / rate_rps / span_s if rate_rps is not None else 1.0
        for arrival in arrivals:
            arrival.at_s = (arrival.at_s - began_s) * stretch
        if self.setting.phases:
            day_s = max(1.0, arrivals[-1].at_s)
            assign_regions(arrivals, self.setting.phases, day_s, Random(self.setting.seed + 1))
        known = [deployment.region for deployment in self.fleet.deployments]
        matched = {
            region: self._rtts.match(region, known) for region in dict.fromkeys(arrival.region for arrival in arrivals)
        }
        for arrival in arrivals:
            arrival.region = matched[arrival.region]
        return arrivals

    def _proxies(self) -> list[str]:
        regions = list(dict.fromkeys(arrival.region for arrival in self.trace if arrival.region))
        regions = sorted(regions) or [self.fleet.deployments[0].region]
        count = self.setting.proxies or len(regions)
        return [regions[n % len(regions)] for n in range(count)]

    def _near(self, region: str) -> list[int]:
        """The proxies that serve a region: those in it, else the nearest ones; all if the region is empty."""
        if not region:
            return list(range(len(self.proxy_regions)))
        rtts_s = [self._rtts.between_s(region, proxy) if proxy != region else -1.0 for proxy in self.proxy_regions]
        return [n for n, rtt_s in enumerate(rtts_s) if rtt_s == min(rtts_s)]


def known_strategies() -> list[str]:
    """Every name that `--strategy` accepts."""
    return [*strategies.names(), *BASELINES]
