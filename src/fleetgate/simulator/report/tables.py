"""The report of a simulation, as JSON and as tables."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleetgate.simulator.fleet import SimulatedFleet
from fleetgate.simulator.report.score import Score
from fleetgate.simulator.serving.world import Arrival

PIPE_WIDTH = 200  # for output that is not a terminal, so that no cell is cut


def json_text(scores: Sequence[Score]) -> str:
    """A list with one object for each strategy."""
    return json.dumps([msgspec.to_builtins(score) for score in scores], indent=2) + "\n"


def print_tables(
    fleet: SimulatedFleet, trace: Sequence[Arrival], capacities_rps: Mapping[str, float], scores: Sequence[Score]
) -> None:
    """Print the capacity of each Deployment for this trace, then the score of each strategy."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    prompt = sum(arrival.prompt_tokens for arrival in trace) / len(trace)
    output = sum(arrival.output_tokens for arrival in trace) / len(trace)
    slo = fleet.slo
    console.print(
        f"{len(trace):,} requests, {prompt:,.0f} prompt and {output:,.0f} output tokens on average; SLO: TTFT "
        f"{slo.ttft_s:g} s + {slo.ttft_s_per_1k_tokens:g} s per 1,000 prompt tokens, TPOT {slo.tpot_s:g} s",
        markup=False,
    )
    console.print(_capacity_table(fleet, capacities_rps))
    console.print(_score_table(scores))
    console.print(
        f"load {scores[0].load:g} of capacity, seed {scores[0].seed}; goodput_ratio: work of requests inside the SLO "
        "per second ÷ capacity; built-in baselines run without admission, clairvoyant knows the true state",
        markup=False,
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("deployment", "region", "sku", "strategy") else "right")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))  # Text: a name is never markup
    return table


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.3f}"
        case _:
            return str(value)


def _capacity_table(fleet: SimulatedFleet, capacities_rps: Mapping[str, float]) -> Table:
    rows: list[Sequence[Any]] = [
        (d.name, d.region, d.sku or None, len(d.endpoints), capacities_rps[d.name]) for d in fleet.deployments
    ]
    rows.append(("sum", "", "", sum(len(d.endpoints) for d in fleet.deployments), sum(capacities_rps.values())))
    return _table(("deployment", "region", "sku", "replicas", "capacity_rps"), rows)


def _score_table(scores: Sequence[Score]) -> Table:
    fields = [name for name in Score.__struct_fields__ if name not in ("load", "seed")]
    # Spaces let a narrow terminal wrap a heading.
    headings = [name.replace("_", " ") for name in fields]
    return _table(headings, [[getattr(score, name) for name in fields] for score in scores])
