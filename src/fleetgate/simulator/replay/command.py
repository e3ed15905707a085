"""`fleetgate replay` after its flags are parsed: read records, take the decisions again, print the report."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fleetgate.core.model import Snapshot
from fleetgate.core.routing.decision_record import Record, RecordedDecision, decode_record
from fleetgate.simulator.replay.compare import Comparison, RecordedRoutes, Reproduction, against_json
from fleetgate.simulator.replay.counterfactual import (
    CounterfactualPair,
    ModelledFleet,
    RecordedArrivals,
    simulate_pairs,
)

BROKEN_SHOWN_MAX = 20  # lines with a warning each; all are counted
PROGRESS_EVERY = 2_000  # lines
PIPE_WIDTH = 200  # for output that is not a terminal, so that no cell is cut


class ReplayFailed(Exception):
    """Nothing could be replayed; the message gives the reason."""


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The values of the flags. Shape: `region` None means the region of each record."""

    records: tuple[Path, ...]
    fleet: Snapshot
    against: Snapshot | None = None
    region: str | None = None
    json: bool = False


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a replay. The fields' names are the keys of `-o json`."""

    decisions: int
    reproduced: int
    reproduced_share: float
    outrun: int
    broken_lines: int
    differences: list[object]
    against: dict[str, object] | None


def replay(options: ReplayOptions) -> None:
    """Replay the records and print the report on standard output. Raises: `ReplayFailed`."""
    reader = RecordReader(options.records)
    routes = RecordedRoutes(options.fleet)
    reproduction = Reproduction(routes, options.region)
    against = (
        Comparison(RecordedRoutes(options.against), routes, options.region) if options.against is not None else None
    )
    arrivals = RecordedArrivals(options.region)
    for line, record in reader.read():
        match record:
            case RecordedDecision():
                reproduction.add(line, record)
                if against is not None:
                    against.add(record)
            case ended:
                if against is not None:
                    against.request_ended(ended.id)
                    arrivals.add(ended)
    if not reproduction.decisions:
        raise ReplayFailed(
            f"no decision could be read from {', '.join(map(str, options.records))}; "
            "give a file that `fleetgate up --record FILE` wrote"
        )
    pairs: list[CounterfactualPair] = []
    not_simulated: list[str] = []
    if against is not None and options.against is not None:
        against.finish()
        warnings: list[str] = []
        pairs, not_simulated = simulate_pairs(arrivals, options.fleet, options.against, warnings.append)
        for sentence in dict.fromkeys(warnings):  # both fleets cause the same warnings
            _warn(sentence)
    report = ReplayReport(
        decisions=reproduction.decisions,
        reproduced=reproduction.reproduced,
        reproduced_share=reproduction.share,
        outrun=reproduction.outrun,
        broken_lines=reader.broken,
        differences=[msgspec.to_builtins(difference) for difference in reproduction.differences],
        against=against_json(against, pairs, not_simulated) if against is not None else None,
    )
    if options.json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    _print_reproduction(console, reproduction, reader.broken)
    if against is not None:
        _print_against(console, against, pairs, not_simulated)


class RecordReader:
    """Reads files of records line by line; a line that is not a record is counted, reported and skipped."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.broken = 0
        self._paths = paths

    def read(self) -> Iterator[tuple[int, Record]]:
        """Every record with its line number. Raises: `ReplayFailed` when a file cannot be read."""
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            for path in self._paths:
                try:
                    task = bar.add_task(path.name, total=path.stat().st_size)
                    yield from self._lines(path, partial(bar.advance, task))
                except OSError as error:
                    raise ReplayFailed(f"{path} cannot be read: {error.strerror}") from None

    def _lines(self, path: Path, progress: Callable[[float], None]) -> Iterator[tuple[int, Record]]:
        pending_bytes = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                pending_bytes += len(line)
                if number % PROGRESS_EVERY == 0:
                    progress(pending_bytes)
                    pending_bytes = 0
                try:
                    record = decode_record(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    self.broken += 1
                    if self.broken <= BROKEN_SHOWN_MAX:
                        _warn(f"{path} line {number} is not a record and is skipped: {error}")
                    continue
                yield number, record


def _warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {sentence}\n")


def _print_reproduction(console: Console, reproduction: Reproduction, broken: int) -> None:
    """Print how many decisions were reproduced, and the first that were not."""
    count, same = reproduction.decisions, reproduction.reproduced
    console.print(f"{same:,} of {count:,} decisions reproduced ({_percent(reproduction.share)})", markup=False)
    if reproduction.outrun:
        console.print(
            f"in {reproduction.outrun:,} of them another worker took the last slot of the first choice first",
            markup=False,
        )
    if broken:
        console.print(f"{broken:,} lines were not records and were skipped", markup=False)
    if not reproduction.differences:
        return
    rows = [
        (str(each.line), each.id, ", ".join(each.recorded) or "–", ", ".join(each.again) or "–", each.because)
        for each in reproduction.differences
    ]
    console.print(_table(("line", "request", "recorded", "again", "because"), rows))
    if count - same > len(rows):
        console.print(f"and {count - same - len(rows):,} more", markup=False)


def _print_against(
    console: Console, against: Comparison, pairs: Sequence[CounterfactualPair], not_simulated: Sequence[str]
) -> None:
    """Print the changes by the other file: first exactly, for the recorded load; then as the simulator models them."""
    before, after = against.before, against.after
    share = against.changed / against.decisions if against.decisions else 0.0
    console.print(
        f"\nExact, each decision alone with the recorded load: {against.changed:,} of {against.decisions:,} "
        f"({_percent(share)}) would choose another Deployment",
        markup=False,
    )
    rows = [
        (f"requests to {name}", f"{before.requests[name]:,}", f"{after.requests[name]:,}")
        for name in sorted(before.requests.keys() | after.requests.keys())
    ]
    rows.append(("predicted to miss the SLO", _percent(before.missed_share), _percent(after.missed_share)))
    rows.append(("USD a request", _figure(before.usd_per_request, 6), _figure(after.usd_per_request, 6)))
    console.print(_table(("", "before", "after"), rows))
    if against.not_judged:
        console.print(
            f"not judged, because no record has their load: {', '.join(sorted(against.not_judged))}", markup=False
        )
    for pair in pairs:
        console.print(
            f"\nModelled, {pair.requests:,} arrivals of model {pair.model} in Gateway {pair.gateway} simulated on both "
            "fleets by their Profiles, without prefix caches",
            markup=False,
        )
        fields = ModelledFleet.__struct_fields__
        cells = [(name.replace("_", " "), _cell(pair.before, name), _cell(pair.after, name)) for name in fields]
        console.print(_table(("", "before", "after"), cells))
    for sentence in not_simulated:
        console.print(f"not modelled: {sentence}", markup=False)


def _cell(modelled: ModelledFleet, name: str) -> str:
    value = getattr(modelled, name)
    return value if type(value) is str else _figure(value, 3)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100.0 * share:.2f} %"


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("line", "before", "after") else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a name is never markup
    return table
