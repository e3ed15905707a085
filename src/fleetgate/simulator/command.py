"""`fleetgate simulate` after its flags are parsed: read the trace, run every strategy, print the report."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fleetgate.core.model import Snapshot
from fleetgate.simulator.faults import BadFault, check_name, parse_fault
from fleetgate.simulator.fleet import BadFleet, UnclearGateway, fleet_of
from fleetgate.simulator.region_phases import BadPhase, parse_phases
from fleetgate.simulator.report.tables import json_text, print_tables
from fleetgate.simulator.simulation import (
    NotPossible,
    Simulation,
    SimulationOutcome,
    SimulationSetting,
    known_strategies,
)
from fleetgate.simulator.traces import BadTrace, read_trace

PLOT_SUFFIXES = (".svg", ".png")


class WrongUsage(Exception):
    """The flags are invalid; the message names the flag and the fix."""


class SimulationFailed(Exception):
    """The simulation could not run; the message gives the reason."""


class SimulateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The values of the flags. Shape: 0 and empty mean not set."""

    trace: Path
    gateway: str = ""
    load: float | None = None
    rate_rps: float | None = None
    strategies: tuple[str, ...] = ()
    region_phase: str = ""
    proxies: int = 0
    faults: tuple[str, ...] = ()
    seed: int = 0
    limit: int = 0
    json: bool = False
    plot: Path | None = None


def check(options: SimulateOptions) -> None:
    """Check the flags before any file is read. Raises: `WrongUsage`, `SimulationFailed`."""
    if options.load is not None and options.rate_rps is not None:
        raise WrongUsage("--load and --rate both set the load; give one of them")
    for flag, value in (("--load", options.load), ("--rate", options.rate_rps)):
        if value is not None and not 0.0 < value < 1e6:
            raise WrongUsage(f"{flag} {value:g} is not a number above 0")
    for flag, count in (("--proxies", options.proxies), ("--limit", options.limit)):
        if count < 0:
            raise WrongUsage(f"{flag} {count} is below 0")
    for name in options.strategies:
        if name not in known_strategies():
            close = get_close_matches(name, known_strategies(), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise WrongUsage(f"--strategy {name!r} is not known; {hint}use one of: {', '.join(known_strategies())}")
    if options.plot is not None:
        if options.plot.suffix not in PLOT_SUFFIXES:
            raise WrongUsage(f"--plot {options.plot} must end in {' or '.join(PLOT_SUFFIXES)}")
        if not options.plot.absolute().parent.is_dir():
            raise WrongUsage(f"--plot {options.plot}: there is no such folder; create it")
        if importlib.util.find_spec("matplotlib") is None:
            raise SimulationFailed("--plot needs matplotlib; install it with `pip install 'fleetgate[plot]'`")


def simulate(options: SimulateOptions, snapshot: Snapshot) -> None:
    """Run every strategy and print the report on standard output. Raises: `WrongUsage`, `SimulationFailed`."""
    try:
        fleet = fleet_of(snapshot, options.gateway)
        setting = SimulationSetting(
            strategies=options.strategies or (fleet.gateway.strategy,),
            load=options.load,
            rate_rps=options.rate_rps,
            seed=options.seed,
            proxies=options.proxies,
            phases=parse_phases(options.region_phase),
            faults=tuple(parse_fault(text) for text in options.faults),
        )
        for fault in setting.faults:
            check_name(fault, fleet)
    except (UnclearGateway, BadPhase, BadFault) as error:
        raise WrongUsage(str(error)) from None
    except BadFleet as error:
        raise SimulationFailed(str(error)) from None
    try:
        trace = read_trace(options.trace, options.limit)
        with _progress_bar() as bar:
            task = bar.add_task("capacity")
            simulation = Simulation(
                fleet, trace, setting, _warn, lambda name: bar.update(task, description=f"capacity of {name}")
            )
            bar.remove_task(task)
            outcomes = [_run(simulation, strategy, bar, len(trace)) for strategy in setting.strategies]
    except (BadTrace, NotPossible) as error:
        raise SimulationFailed(str(error)) from None
    scores = [outcome.score for outcome in outcomes]
    if options.json:
        sys.stdout.write(json_text(scores))
    else:
        print_tables(fleet, trace, simulation.capacities, scores)
    if options.plot is not None:
        _draw(options.plot, simulation, outcomes)


def _run(simulation: Simulation, strategy: str, bar: Progress, total: int) -> SimulationOutcome:
    task = bar.add_task(strategy, total=total)
    return simulation.run(strategy, lambda done: bar.update(task, completed=done))


def _draw(path: Path, simulation: Simulation, outcomes: Sequence[SimulationOutcome]) -> None:
    # Imported here: matplotlib takes a second to import, and most runs draw no plot.
    from fleetgate.simulator.report.plot import draw

    draw(path, simulation.fleet, simulation.work, {outcome.score.strategy: outcome.arrivals for outcome in outcomes})
    sys.stderr.write(f"wrote {path}\n")


def _warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {sentence}\n")


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        yield bar
