"""`fleetgate replay` behind its flags: reads records with a progress bar, takes the decisions again, reports."""

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
from fleetgate.simulator.replay.counterfactual import Arrivals, CounterfactualPair, ModelledDeployment, simulate_pairs

BROKEN_TOLD_MAX = 20  # one by one; all are counted
PROGRESS_EVERY = 2_000  # lines


class ReplayFailed(Exception):
    """Nothing could be replayed; the text says why."""


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The flags. Shape: `region` None takes what each record says."""

    records: tuple[Path, ...]
    fleet: Snapshot
    against: Snapshot | None = None
    region: str | None = None
    json: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found. The fields' names are the keys of `-o json`."""

    decisions: int
    reproduced: int
    reproduced_share: float
    outrun: int
    broken_lines: int
    differences: list[object]
    against: dict[str, object] | None


def replay(ask: ReplayOptions) -> None:
    """Replay and report, on standard output. Raises: `ReplayFailed`."""
    reader = RecordReader(ask.records)
    lanes = RecordedRoutes(ask.fleet)
    reproduction = Reproduction(lanes, ask.region)
    against = Comparison(RecordedRoutes(ask.against), lanes, ask.region) if ask.against is not None else None
    arrivals = Arrivals(ask.region)
    for line, record in reader.read():
        match record:
            case RecordedDecision():
                reproduction.see(line, record)
                if against is not None:
                    against.see(record)
            case ended:
                if against is not None:
                    against.ended(ended.id)
                    arrivals.see(ended)
    if not reproduction.decisions:
        raise ReplayFailed(
            f"no decision could be read from {', '.join(map(str, ask.records))}; "
            "give a file that `fleetgate up --record FILE` wrote"
        )
    pairs: list[CounterfactualPair] = []
    why_not: list[str] = []
    if against is not None and ask.against is not None:
        against.finish()
        told: list[str] = []
        pairs, why_not = simulate_pairs(arrivals, ask.fleet, ask.against, told.append)
        for sentence in dict.fromkeys(told):  # both fleets know the same regions
            _warn(sentence)
    report = Report(
        decisions=reproduction.decisions,
        reproduced=reproduction.reproduced,
        reproduced_share=reproduction.share,
        outrun=reproduction.outrun,
        broken_lines=reader.broken,
        differences=[msgspec.to_builtins(difference) for difference in reproduction.differences],
        against=against_json(against, pairs, why_not) if against is not None else None,
    )
    if ask.json:
        sys.stdout.write(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
    else:
        _print(Console(width=None if sys.stdout.isatty() else 200, highlight=False), reproduction, reader.broken)
        if against is not None:
            _print_against(
                Console(width=None if sys.stdout.isatty() else 200, highlight=False), against, pairs, why_not
            )


class RecordReader:
    """Reads files of records line by line; what is no record is told, counted and left out."""

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
        since_bytes = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                since_bytes += len(line)
                if number % PROGRESS_EVERY == 0:
                    progress(since_bytes)
                    since_bytes = 0
                try:
                    record = decode_record(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    self.broken += 1
                    if self.broken <= BROKEN_TOLD_MAX:
                        _warn(f"{path} line {number} is no record and is left out: {error}")
                    continue
                yield number, record


def _warn(sentence: str) -> None:
    sys.stderr.write(f"warning: {sentence}\n")


def _print(console: Console, reproduction: Reproduction, broken: int) -> None:
    """How many decisions came out as they did, and the first that did not."""
    count, same = reproduction.decisions, reproduction.reproduced
    console.print(f"{same:,} of {count:,} decisions reproduced ({_percent(reproduction.share)})", markup=False)
    if reproduction.outrun:
        console.print(
            f"in {reproduction.outrun:,} of them another worker took the last place of the first choice in between",
            markup=False,
        )
    if broken:
        console.print(f"{broken:,} lines were no records and are left out", markup=False)
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
    console: Console, against: Comparison, pairs: Sequence[CounterfactualPair], why_not: Sequence[str]
) -> None:
    """What the other file would change: first exactly, for the load as it was; then as the simulator models it."""
    before, after = against.before, against.after
    share = against.changed / against.decisions if against.decisions else 0.0
    console.print(
        f"\nExact, each decision by itself with the load as it was: {against.changed:,} of {against.decisions:,} "
        f"({_percent(share)}) would go elsewhere",
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
            f"not judged, for no record tells how they stood: {', '.join(sorted(against.not_judged))}", markup=False
        )
    for pair in pairs:
        console.print(
            f"\nModelled, {pair.requests:,} arrivals of model {pair.model} in Gateway {pair.gateway} played to both "
            "fleets by their Profiles, nothing cached",
            markup=False,
        )
        fields = [name for name in ModelledDeployment.__struct_fields__]
        cells = [(name.replace("_", " "), _cell(pair.before, name), _cell(pair.after, name)) for name in fields]
        console.print(_table(("", "before", "after"), cells))
    for sentence in why_not:
        console.print(f"not modelled: {sentence}", markup=False)


def _cell(modelled: ModelledDeployment, name: str) -> str:
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
