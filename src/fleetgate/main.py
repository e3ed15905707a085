"""The `fleetgate` command. Only this module may import every package."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fleetgate import __version__
from fleetgate.cli import flags
from fleetgate.cli.client import DEFAULT_DATA_DIR
from fleetgate.cli.commands import app
from fleetgate.demo.command import run_demo
from fleetgate.engine.command import SETTINGS as ENGINE_SETTINGS
from fleetgate.engine.command import engine
from fleetgate.manifests import Unreadable
from fleetgate.policies import plugins
from fleetgate.proxy.transport import DEFAULT_TRANSPORT
from fleetgate.supervisor.listeners import CannotStart
from fleetgate.supervisor.up import UpOptions, run_up

WORKERS_DEFAULT_MAX = 8  # with more workers, the network of a machine is the limit and not its cores


@app.command()
def up(
    config: flags.ConfigFile = None,
    data_dir: flags.DataDir = DEFAULT_DATA_DIR,
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients, over HTTP.")] = "127.0.0.1:7800",
    api_listen: flags.ApiListen = "127.0.0.1:7801",
    ops_listen: flags.OpsListen = "",
    workers: flags.Workers = 0,
    region: flags.Region = "",
    tls_listen: Annotated[str, typer.Option(help="HOST:PORT for clients, over HTTPS; needs --tls.")] = "",
    tls: flags.Tls = "",
    auth: flags.Auth = "keys",
    cors: flags.Cors = None,
    egress_allow: flags.EgressAllow = "",
    access_log: Annotated[str, typer.Option(help="Path of the access log, `-` for standard output, or `off`.")] = "-",
    record: flags.RecordFile = None,
    lb_grace_s: flags.LbGrace = -1.0,
    grace_s: flags.Grace = 30.0,
    max_stale_s: flags.MaxStale = 86_400.0,
    connections_max: flags.ConnectionsMax = 0,
    ip_connections_max: flags.IpConnectionsMax = -1,
    key_connections_max: flags.KeyConnectionsMax = -1,
    body_budget_mib: flags.BodyBudgetMib = 0,
    transport: flags.Transport = DEFAULT_TRANSPORT,
) -> None:
    """Run a whole Fleetgate on this machine: control plane, console and proxies.

    Example: `fleetgate up --config fleet.yaml`, then `fleetgate keys create laptop`
    """
    options = UpOptions(
        config=config,
        data_dir=data_dir.expanduser().absolute(),
        listen=listen,
        api_listen=api_listen,
        ops_listen=ops_listen,
        workers=workers or min(WORKERS_DEFAULT_MAX, len(os.sched_getaffinity(0))),
        region=region,
        tls_listen=tls_listen,
        tls=tls,
        auth=auth,
        cors=cors or [],
        egress_allow=[text.strip() for text in egress_allow.split(",") if text.strip()],
        access_log=access_log,
        record=record,
        lb_grace_s=lb_grace_s,
        grace_s=grace_s,
        max_stale_s=max_stale_s,
        connections_max=connections_max,
        ip_connections_max=ip_connections_max,
        key_connections_max=key_connections_max,
        body_budget_mib=body_budget_mib,
        transport=transport,
    )
    try:
        code = run_up(options)
    except CannotStart as reason:
        sys.stderr.write(f"{reason}\n")
        code = 1
    raise typer.Exit(code)


@app.command()
def demo(
    once: Annotated[
        bool, typer.Option("--once", help="Run the tour and exit, with code 0 if every claim holds, else 1.")
    ] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Data directory; without it, a temporary one.")] = None,
) -> None:
    """Show three regions with a real model on this machine: a stream, an overflow, a region killed under load."""
    raise typer.Exit(run_demo(once=once, data_dir=data_dir))


class ReportFormat(StrEnum):
    """The formats of reports."""

    TABLE = "table"
    JSON = "json"


TRACE_COLUMNS = "timestamp_s,prompt_tokens,output_tokens[,prefix_block_ids_512][,region][,key]"
FleetFile = Annotated[
    Path, typer.Option(help="YAML file with Gateway, Deployments and Profiles.", exists=True, dir_okay=False)
]
TraceFile = Annotated[
    Path, typer.Option(help=f"CSV or CSV.gz file with the columns {TRACE_COLUMNS}.", exists=True, dir_okay=False)
]
Strategies = Annotated[
    list[str] | None,
    typer.Option(help="Strategies or baselines, comma-separated or repeated; without it, the Gateway's own."),
]
Load = Annotated[
    float | None, typer.Option(help="Rescale the trace to this share of the fleet's capacity, such as 0.8.")
]
Phases = Annotated[
    str,
    typer.Option(help="Regions of the clients, each with the hours by which its day is ahead: us-east=0,eu-west=8."),
]


@app.command()
def simulate(
    fleet: FleetFile,
    trace: TraceFile,
    gateway: Annotated[str, typer.Option(help="Name of the Gateway, if the fleet has several.")] = "",
    load: Load = None,
    rate: Annotated[float | None, typer.Option(help="Rescale the trace to this number of requests per second.")] = None,
    strategy: Strategies = None,
    region_phase: Phases = "",
    proxies: Annotated[int, typer.Option(help="Proxies that share the requests; 0: one for each region.")] = 0,
    fault: Annotated[list[str] | None, typer.Option(help="KIND:NAME@START[+DURATION][xFACTOR]; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; equal inputs and seed give equal figures.")] = 0,
    limit: Annotated[int, typer.Option(help="Use the first N requests of the trace; 0: all.")] = 0,
    output: Annotated[ReportFormat, typer.Option("-o", "--output", help="Output format.")] = ReportFormat.TABLE,
    plot: Annotated[Path | None, typer.Option(help="Draw TTFT and goodput into this file, .svg or .png.")] = None,
) -> None:
    """Simulate a fleet under a trace, with the code that routes live traffic.

    Profiles give the times of the engines, and round trips between regions those of the network; no connection is
    made. The capacity of each Deployment for this trace is measured first: `--load` and `goodput_ratio` are shares of
    the sum.

    Built-in baselines: round_robin, gpu_count_weights, least_outstanding, static_weights, region_local, nearest_first,
    clairvoyant, clairvoyant_no_shed.

    Faults: `slow:llama-us@300+150x3` (three times slower from second 300 on, for 150 s), `down:eu-west@600` (a region
    or a Deployment dies), `refuse:llama-eu@60+30` (429 for 30 s), `slow:llama-us@0x1.3` (the Profile is 30 % too
    optimistic).

    Columns: goodput_ratio (work inside the SLO per second ÷ capacity), slo_ttft_share and slo_tpot_share (share
    of all requests within the target), ttft_p50_s and ttft_p99_s (of served requests), shed_share (refused or lost),
    overcommit_max (largest excess over a limit, as a share of it), spill_ratio (share outside the first rank or the
    region), cost_usd_per_mtok (per million tokens inside the SLO), jain (fairness between keys; 1: all equal).

    Examples: `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --load 1.2` ·
    `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --load 0.7 --strategy overflow,round_robin -o json` ·
    `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --region-phase us-east=0,eu-west=8 --plot day.svg`
    """
    # Imported here: validation and the simulator take half a second, which no other command must wait for.
    from fleetgate.control.snapshot.offline import read_fleet
    from fleetgate.simulator import command as simulator

    plugins.load()
    strategies = tuple(name.strip() for text in strategy or [] for name in text.split(",") if name.strip())
    options = simulator.SimulateOptions(
        trace=trace, gateway=gateway, load=load, rate_rps=rate, strategies=strategies, region_phase=region_phase,
        proxies=proxies, faults=tuple(fault or []), seed=seed, limit=limit, json=output is ReportFormat.JSON, plot=plot,
    )  # fmt: skip
    try:
        simulator.check(options)
        simulator.simulate(options, read_fleet(str(fleet)))
    except (simulator.WrongUsage, simulator.SimulationFailed, Unreadable) as reason:
        sys.stderr.write(f"{reason}\n")
        raise typer.Exit(2 if type(reason) is simulator.WrongUsage else 1) from None


@app.command()
def replay(
    records: Annotated[
        list[Path], typer.Argument(help="Files that `fleetgate up --record` wrote.", exists=True, dir_okay=False)
    ],
    fleet: Annotated[
        Path, typer.Option(help="YAML file in use when the decisions were recorded.", exists=True, dir_okay=False)
    ],
    region: Annotated[
        str | None, typer.Option(help="Decide as a proxy of this region; without it, the region of each record.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another YAML file, to compare its decisions.", exists=True, dir_okay=False)
    ] = None,
    output: Annotated[ReportFormat, typer.Option("-o", "--output", help="Output format.")] = ReportFormat.TABLE,
) -> None:
    """Repeat recorded routing decisions: equal under the same file, and different where another file changes them.

    Exact: each decision alone, with the recorded load. Modelled, if all Deployments have Profiles: the simulator plays
    the recorded requests to both fleets, because a changed decision changes the load of later ones. No connection is
    made.

    Examples: `fleetgate replay records.jsonl --fleet fleet.yaml` ·
    `fleetgate replay records.jsonl --fleet fleet.yaml --against cheaper.yaml -o json`
    """
    # Imported here: validation and the simulator take half a second, which no other command must wait for.
    from fleetgate.control.snapshot.offline import read_fleet
    from fleetgate.simulator.replay import command as replayer

    plugins.load()
    try:
        replayer.replay(
            replayer.ReplayOptions(
                records=tuple(records),
                fleet=read_fleet(str(fleet)),
                against=read_fleet(str(against)) if against is not None else None,
                region=region,
                json=output is ReportFormat.JSON,
            )
        )
    except (replayer.ReplayFailed, Unreadable) as reason:
        sys.stderr.write(f"{reason}\n")
        raise typer.Exit(1) from None


app.command("engine", context_settings=ENGINE_SETTINGS)(engine)


@app.command()
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"fleetgate {__version__}\n")


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
