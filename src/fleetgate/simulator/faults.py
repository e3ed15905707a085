"""Scheduled faults: a Deployment slows down without an error, dies, or refuses requests; a region dies."""

import re
from collections.abc import Sequence
from functools import partial
from math import prod

import msgspec

from fleetgate.core.model import Deployment
from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.serving.world import World

FORM = "KIND:NAME@START[+DURATION][xFACTOR], for example slow:llama-us@300+150x3, down:eu-west@600+120, refuse:b@60"
KINDS = ("slow", "down", "refuse")
_FAULT = re.compile(r"(\w+):([^@]+)@([0-9.]+)(?:\+([0-9.]+))?(?:x([0-9.]+))?$")


class BadFault(Exception):
    """A fault cannot be parsed or matches no Deployment; the message shows the form."""


class SimulatedFault(msgspec.Struct, frozen=True):
    """One fault. Units: seconds of the run, `ends_s` infinite if it does not end; `factor` multiplies a step's time."""

    kind: str
    name: str
    begins_s: float
    ends_s: float
    factor: float


def parse_fault(text: str) -> SimulatedFault:
    """Parse a value of `--fault`.

    Raises: `BadFault`.
    """
    match = _FAULT.match(text)
    if match is None or match[1] not in KINDS:
        raise BadFault(f"--fault {text!r} is not {FORM}; kinds are {', '.join(KINDS)}")
    kind, name, start, duration, factor = match.groups()
    if (kind == "slow") != (factor is not None):
        raise BadFault(f"--fault {text!r}: `slow` needs a factor, the other kinds have none; {FORM}")
    try:
        begins_s = float(start)
        ends_s = begins_s + float(duration) if duration else float("inf")
        times = float(factor) if factor else 1.0
    except ValueError:
        raise BadFault(f"--fault {text!r}: a number is malformed; {FORM}") from None
    if times <= 0.0:
        raise BadFault(f"--fault {text!r}: the factor must be above 0")
    return SimulatedFault(kind, name, begins_s, ends_s, times)


def schedule_faults(faults: Sequence[SimulatedFault], fleet: SimulatedFleet, world: World) -> None:
    """Schedule the beginning and end of every fault in the world.

    Raises: `BadFault` if a name is neither a Deployment nor, for `down`, a region.
    """
    all_engine_faults = [_EngineFaults(engine, world) for engine in range(len(world.engines))]
    for fault in faults:
        check_name(fault, fleet)
        for engine_faults in all_engine_faults:
            if _matches(fault, world.engines[engine_faults.engine].deployment):
                world.at(fault.begins_s, partial(engine_faults.begin, fault))
                if fault.ends_s < float("inf"):
                    world.at(fault.ends_s, partial(engine_faults.end, fault))


def check_name(fault: SimulatedFault, fleet: SimulatedFleet) -> None:
    """Check that a fault matches a Deployment.

    Raises: `BadFault`.
    """
    if not any(_matches(fault, deployment) for deployment in fleet.deployments):
        regions = {deployment.region for deployment in fleet.deployments if deployment.region}
        known = sorted(
            {deployment.name for deployment in fleet.deployments} | (regions if fault.kind == "down" else set())
        )
        kind = "a Deployment or a region" if fault.kind == "down" else "a Deployment"
        raise BadFault(f"--fault {fault.kind}:{fault.name} does not name {kind} of the fleet: {', '.join(known)}")


def _matches(fault: SimulatedFault, deployment: Deployment) -> bool:
    return fault.name == deployment.name or (fault.kind == "down" and fault.name == deployment.region)


class _EngineFaults:
    """The active faults of one engine: slow-downs multiply, and the engine is up once no `down` is active."""

    def __init__(self, engine: int, world: World) -> None:
        self.engine = engine
        self.world = world
        self.active: list[SimulatedFault] = []

    def begin(self, fault: SimulatedFault, now_s: float) -> None:
        """Add a fault."""
        self.active.append(fault)
        if fault.kind == "down" and self._count("down") == 1:
            self.world.take_down(self.engine, now_s)
        self._apply(fault.kind, now_s)

    def end(self, fault: SimulatedFault, now_s: float) -> None:
        """Remove a fault."""
        self.active.remove(fault)
        if fault.kind == "down" and not self._count("down"):
            self.world.bring_up(self.engine)
        self._apply(fault.kind, now_s)

    def _count(self, kind: str) -> int:
        return sum(fault.kind == kind for fault in self.active)

    def _apply(self, kind: str, now_s: float) -> None:
        self.world.engines[self.engine].refuses = self._count("refuse") > 0
        if kind == "slow":
            self.world.slow_down(self.engine, prod(fault.factor for fault in self.active), now_s)
