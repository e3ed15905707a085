"""The `fleetgate` command: with `running.py` the only module that may import every part, so they are joined here."""

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
from fleetgate.supervisor.listeners import CannotStart
from fleetgate.supervisor.up import UpOptions, run_up

WORKERS_DEFAULT_MAX = 8  # beyond that one machine's network is the limit, not its cores


@app.command()
def up(
    config: flags.ConfigFile = None,
    data_dir: flags.DataDir = DEFAULT_DATA_DIR,
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = "127.0.0.1:7800",
    api_listen: flags.ApiListen = "127.0.0.1:7801",
    ops_listen: flags.OpsListen = "",
    workers: Annotated[int, typer.Option(help="Worker processes; 0 for one a core, 8 at most.")] = 0,
    region: Annotated[str, typer.Option(help="The region this proxy stands in; its own is preferred.")] = "",
    tls_listen: Annotated[str, typer.Option(help="HOST:PORT for HTTPS, together with --tls.")] = "",
    tls: Annotated[str, typer.Option(help="`dev` for a development CA, or CERT.pem,KEY.pem (reloaded).")] = "",
    auth: Annotated[str, typer.Option(help="`keys`, or `none` to let anybody in (loopback only).")] = "keys",
    cors: flags.Cors = None,
    egress_allow: flags.EgressAllow = "",
    access_log: Annotated[str, typer.Option(help="A path, `-` for standard output, or `off`.")] = "-",
    record: flags.RecordFile = None,
    lb_grace_s: flags.LbGrace = -1.0,
    grace_s: flags.Grace = 30.0,
    max_stale_s: flags.MaxStale = 86_400.0,
    connections_max: flags.ConnectionsMax = 0,
    ip_connections_max: flags.IpConnectionsMax = -1,
    key_connections_max: flags.KeyConnectionsMax = -1,
    body_budget_mib: flags.BodyBudgetMib = 0,
) -> None:
    """Run everything on this machine: control plane, console and proxies.

    Example: fleetgate up --config fleet.yaml, then fleetgate keys create laptop
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
    )
    try:
        code = run_up(options)
    except CannotStart as reason:
        sys.stderr.write(f"{reason}\n")
        code = 1
    raise typer.Exit(code)


@app.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Run the tour and exit: 0 when all of it held, else 1.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Where state is kept; a temporary directory otherwise.")] = None,
) -> None:
    """Three regions with a real model on this machine: a stream, an overflow, a region killed under load."""
    raise typer.Exit(run_demo(once=once, data_dir=data_dir))


class Form(StrEnum):
    """The forms in which `simulate` reports."""

    TABLE = "table"
    JSON = "json"


TRACE_COLUMNS = "timestamp_s,prompt_tokens,output_tokens[,prefix_block_ids_512][,region][,key]"
FleetFile = Annotated[
    Path, typer.Option(help="YAML with Gateway, Deployments and Profiles.", exists=True, dir_okay=False)
]
TraceFile = Annotated[Path, typer.Option(help=f"CSV or CSV.gz: {TRACE_COLUMNS}.", exists=True, dir_okay=False)]
Strategies = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable or comma-separated; the Gateway's own otherwise. The baselines are listed above."),
]
Load = Annotated[
    float | None, typer.Option(help="Rescale the trace to this share of the fleet's capacity; 1 is all of it.")
]
Phases = Annotated[
    str, typer.Option(help="Clients' regions, each with the hours that its day is ahead: us-east=0,eu-west=8.")
]


@app.command()
def simulate(
    fleet: FleetFile,
    trace: TraceFile,
    gateway: Annotated[str, typer.Option(help="Which Gateway, where the fleet has several.")] = "",
    load: Load = None,
    rate: Annotated[float | None, typer.Option(help="Rescale the trace to so many requests a second.")] = None,
    strategy: Strategies = None,
    region_phase: Phases = "",
    proxies: Annotated[int, typer.Option(help="Proxies that share the arrivals; 0 is one for each region.")] = 0,
    fault: Annotated[list[str] | None, typer.Option(help="KIND:NAME@START[+DURATION][xFACTOR]. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Same inputs and seed, same figures.")] = 0,
    limit: Annotated[int, typer.Option(help="Only the first N requests of the trace; 0 for all.")] = 0,
    output: Annotated[Form, typer.Option("-o", "--output", help="How to print.")] = Form.TABLE,
    plot: Annotated[Path | None, typer.Option(help="Draw TTFT and goodput into FILE.svg or FILE.png.")] = None,
) -> None:
    """Play a trace to a fleet that exists only on paper, with the code that routes live traffic.

    Engines take time as their Profiles say, the network as the regions' round trips say; nothing is dialled. What each
    Deployment takes of this very trace is measured first: `--load` and `goodput_ratio` are shares of the sum.

    Built-in baselines: round_robin, gpu_count_weights, least_outstanding, static_weights, region_local, nearest_first,
    clairvoyant, clairvoyant_no_shed.

    Faults: `slow:llama-us@300+150x3` (from second 300 on, for 150 s, three times slower), `down:eu-west@600` (a region
    or a Deployment dies), `refuse:llama-eu@60+30` (429 for 30 s), `slow:llama-us@0x1.3` (the Profile is 30 % too good).

    Columns: goodput_ratio (work inside the SLO per second ÷ capacity), slo_ttft_share and slo_tpot_share (of all
    requests, those that kept the target), ttft_p50_s and ttft_p99_s (of those served), shed_share (refused or lost),
    overcommit_max (most in flight beyond a limit, of the limit), spill_ratio (off the first rank, or the region),
    cost_usd_per_mtok (per million tokens inside the SLO), jain (1: all keys fared alike).

    Examples: `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --load 1.2` ·
    `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --load 0.7 --strategy overflow,round_robin -o json` ·
    `fleetgate simulate --fleet fleet.yaml --trace conv.csv.gz --region-phase us-east=0,eu-west=8 --plot day.svg`
    """
    # Imported here: validation and the simulator take half a second that other commands need not wait for.
    from fleetgate.control.snapshot.offline import read_fleet
    from fleetgate.simulator import command as simulating

    plugins.load()
    wanted = tuple(name.strip() for text in strategy or [] for name in text.split(",") if name.strip())
    ask = simulating.SimulateOptions(
        trace=trace, gateway=gateway, load=load, rate_rps=rate, strategies=wanted, region_phase=region_phase,
        proxies=proxies, faults=tuple(fault or []), seed=seed, limit=limit, json=output is Form.JSON, plot=plot,
    )  # fmt: skip
    try:
        simulating.check(ask)
        simulating.simulate(ask, read_fleet(str(fleet)))
    except (simulating.WrongUsage, simulating.SimulationFailed, Unreadable) as reason:
        sys.stderr.write(f"{reason}\n")
        raise typer.Exit(2 if type(reason) is simulating.WrongUsage else 1) from None


@app.command()
def replay(
    records: Annotated[
        list[Path], typer.Argument(help="Files that `fleetgate up --record` wrote.", exists=True, dir_okay=False)
    ],
    fleet: Annotated[
        Path, typer.Option(help="The YAML under which the decisions were taken.", exists=True, dir_okay=False)
    ],
    region: Annotated[
        str | None, typer.Option(help="Decide as a proxy of this region; without it, of each record's own.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another YAML: what it would have changed.", exists=True, dir_okay=False)
    ] = None,
    output: Annotated[Form, typer.Option("-o", "--output", help="How to print.")] = Form.TABLE,
) -> None:
    """Take recorded routing decisions again: under the same file they come out the same, under another they may not.

    Exact: each decision by itself, with the load as it was. Modelled: the recorded arrivals played to both fleets by
    the simulator, where all Deployments have Profiles, because moved load changes what follows. Nothing is dialled.

    Examples: `fleetgate replay records.jsonl --fleet fleet.yaml` ·
    `fleetgate replay records.jsonl --fleet fleet.yaml --against cheaper.yaml -o json`
    """
    # Imported here: validation and the simulator take half a second that other commands need not wait for.
    from fleetgate.control.snapshot.offline import read_fleet
    from fleetgate.simulator.replay import command as replaying

    plugins.load()
    try:
        replaying.replay(
            replaying.ReplayOptions(
                records=tuple(records),
                fleet=read_fleet(str(fleet)),
                against=read_fleet(str(against)) if against is not None else None,
                region=region,
                json=output is Form.JSON,
            )
        )
    except (replaying.ReplayFailed, Unreadable) as reason:
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
