"""The `fleetgate` command: the one module that may import every part, and so the one that puts them together."""

import ipaddress
import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fleetgate import __version__
from fleetgate.cli.app import app
from fleetgate.cli.client import DEFAULT_DATA_DIR
from fleetgate.cli.demo import run_demo
from fleetgate.control.config import ENV as CONTROL_ENV
from fleetgate.control.config import ControlConfig
from fleetgate.control.datadir import Unusable, open_data_dir
from fleetgate.core.board import WORKERS_MAX, layout
from fleetgate.providers.documents import Unreadable
from fleetgate.providers.spool import Happened, Spool
from fleetgate.proxy.child import Child, python_child
from fleetgate.proxy.config import ENV as WORKER_ENV
from fleetgate.proxy.config import WorkerConfig
from fleetgate.proxy.succession import Renewal
from fleetgate.proxy.supervisor import (
    CannotStart,
    Supervisor,
    open_listener,
    open_listeners,
    say_json,
    shared_memory,
    split_address,
)
from fleetgate.rules import plugins
from fleetgate.simulator.command import SETTINGS as ENGINE_SETTINGS
from fleetgate.simulator.command import engine

GENERATIONS = 2  # of workers: those that serve, and those that they replace
LB_GRACE_S = 5.0  # how long load balancers in front may go on sending after readiness fell
WORKERS_DEFAULT_MAX = 8  # beyond that one machine's network is the limit, not its cores
PRIVATE_RANGES = ["127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `fleetgate up` was told."""

    config: Path | None
    data_dir: Path
    listen: str
    api_listen: str
    workers: int
    region: str
    tls_listen: str
    tls: str
    auth: str
    cors: list[str]
    egress_allow: list[str]
    access_log: str
    record: Path | None
    lb_grace_s: float
    grace_s: float


class Opened(msgspec.Struct, frozen=True):
    """What children inherit: descriptors, by use."""

    board: int
    listeners: list[int]
    tls_listeners: list[int]
    api: int
    wake: list[tuple[int, int]]
    life: int


def is_loopback(address: str, flag: str) -> bool:
    """Whether only this machine can reach a listener."""
    host, _ = split_address(address, flag)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_options(options: UpOptions) -> None:
    """Refuse combinations that would be unsafe or cannot work.

    Raises: `CannotStart` naming the flag and the fix.
    """
    if options.auth not in ("keys", "none"):
        raise CannotStart(f"--auth {options.auth!r} is neither `keys` nor `none`")
    for address, flag in ((options.listen, "--listen"), (options.tls_listen, "--tls-listen")):
        if address and options.auth == "none" and not is_loopback(address, flag):
            raise CannotStart(
                f"--auth none lets anybody use your GPUs, so it is for loopback only, and {flag} is {address}; "
                "use 127.0.0.1 or leave --auth none out"
            )
    if not 1 <= options.workers <= WORKERS_MAX:
        raise CannotStart(f"--workers {options.workers} is not from 1 to {WORKERS_MAX}")
    if bool(options.tls_listen) != bool(options.tls):
        raise CannotStart("--tls-listen and --tls belong together; give --tls dev or --tls CERT,KEY")
    for text in options.egress_allow:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            raise CannotStart(f"--egress-allow {text!r} is not a CIDR such as 10.0.0.0/8") from None
    if options.access_log not in ("-", "off"):
        check_writable("--access-log", Path(options.access_log), "choose another path, `-` or `off`")
    if options.record is not None:
        check_writable("--record", options.record, "choose another path")


def check_writable(flag: str, path: Path, fix: str) -> None:
    """Open a file for appending once. Raises: `CannotStart` naming the flag and the fix."""
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise CannotStart(f"{flag} {path} cannot be written: {error.strerror}; {fix}") from None


def certificate_files(tls: str) -> tuple[str, str]:
    """The two paths of `--tls CERT,KEY`; empty for none and for `dev`.

    Raises: `CannotStart`.
    """
    if tls in ("", "dev"):
        return "", ""
    cert, comma, key = tls.partition(",")
    if not comma:
        raise CannotStart(f"--tls {tls!r} is neither `dev` nor two paths CERT,KEY")
    for path in (cert, key):
        if not Path(path).is_file():
            raise CannotStart(f"--tls names {path}, which is not a file")
    return cert, key


def run_up(options: UpOptions) -> int:
    """Open everything, start the processes, and keep them running until told to stop.

    Raises: `CannotStart`.
    """
    # Imported here: validation, store and cryptography take half a second that other commands need not wait for.
    from fleetgate.control.loading import check_file
    from fleetgate.proxy.tls import development_authority

    check_options(options)
    files = certificate_files(options.tls)
    try:
        open_data_dir(options.data_dir)
    except Unusable as error:
        raise CannotStart(str(error)) from None
    plugins.load()  # the control process tells of those that cannot be used
    if options.config is not None:
        mistakes = check_file(str(options.config), options.data_dir)
        if mistakes:
            raise CannotStart("\n".join(mistakes))
    if options.tls == "dev":
        development_authority(options.data_dir / "tls")
    listeners = open_listeners(options.listen, "--listen", options.workers)
    tls_listeners = open_listeners(options.tls_listen, "--tls-listen", options.workers) if options.tls else []
    api = open_listener(options.api_listen, "--api-listen")
    columns = GENERATIONS * options.workers
    board_fd, board = shared_memory(columns)
    life_read, life_write = os.pipe()  # only the supervisor keeps the write end, so its death is an end of file
    wake = [os.pipe() for _ in range(columns)]
    for pair in wake:
        os.set_blocking(pair[0], False)
        os.set_blocking(pair[1], False)
    opened = Opened(
        board=board_fd,
        listeners=[listener.fileno() for listener in listeners],
        tls_listeners=[listener.fileno() for listener in tls_listeners],
        api=api.fileno(),
        wake=wake,
        life=life_read,
    )

    def workers_of(generation: int) -> list[Child]:
        first = generation * options.workers
        return [worker_child(first + index, options, opened, files) for index in range(options.workers)]

    children = [*workers_of(0), control_child(options, opened)]
    announce(options, listeners[0].getsockname()[1], api.getsockname()[1])
    try:
        grace_s = options.grace_s + max(options.lb_grace_s, LB_GRACE_S)
        renewal = Renewal(workers_of, partial(tell, Spool(options.data_dir)))
        return Supervisor(children, board, grace_s, say_json, renewal, [*listeners, *tls_listeners]).run()
    finally:
        os.close(life_write)


def tell(spool: Spool, sentence: str) -> None:
    """Log what the supervisor did, and make it an Event."""
    say_json(sentence)
    spool.add(Happened("Worker", "all", sentence[:1].upper() + sentence[1:] + "."))


def worker_child(column: int, options: UpOptions, opened: Opened, files: tuple[str, str]) -> Child:
    """One worker with its column on the board, to be started by the supervisor."""
    loopback = is_loopback(options.listen, "--listen")
    index = column % options.workers  # both generations accept from the same sockets
    config = WorkerConfig(
        index=column,
        workers=GENERATIONS * options.workers,
        serving=options.workers,
        layout=layout(),
        data_dir=str(options.data_dir),
        board_fd=opened.board,
        listen_fd=opened.listeners[index],
        tls_listen_fd=opened.tls_listeners[index] if opened.tls_listeners else -1,
        tls_cert=files[0],
        tls_key=files[1],
        wake_fd=opened.wake[column][0],
        wake_fds=[pair[1] for pair in opened.wake],
        life_fd=opened.life,
        auth=options.auth,
        cors=options.cors,
        region=options.region,
        access_log=options.access_log,
        record=str(options.record.absolute()) if options.record is not None else "off",
        lb_grace_s=options.lb_grace_s if options.lb_grace_s >= 0 else 0.0 if loopback else LB_GRACE_S,
        grace_s=options.grace_s,
    )
    fds = [config.board_fd, config.listen_fd, config.wake_fd, *config.wake_fds, config.life_fd]
    if config.tls_listen_fd >= 0:
        fds.append(config.tls_listen_fd)
    argv, env = python_child("fleetgate.proxy.worker", WORKER_ENV, msgspec.json.encode(config))
    return Child(name=f"worker {index}", argv=argv, env=env, fds=fds, worker=column)


def control_child(options: UpOptions, opened: Opened) -> Child:
    """The control process, to be started by the supervisor."""
    default_ranges = PRIVATE_RANGES if is_loopback(options.api_listen, "--api-listen") else []
    config = ControlConfig(
        data_dir=str(options.data_dir),
        config_file=str(options.config) if options.config is not None else "",
        api_fd=opened.api,
        api_listen=options.api_listen,
        listen=options.listen,
        tls_listen=options.tls_listen,
        board_fd=opened.board,
        workers=GENERATIONS * options.workers,
        serving=options.workers,
        auth=options.auth,
        egress_allow=options.egress_allow or default_ranges,
        region=options.region,
        life_fd=opened.life,
        supervised=True,
    )
    argv, env = python_child("fleetgate.control.server", CONTROL_ENV, msgspec.json.encode(config))
    fds = [opened.api, opened.board, opened.life]
    return Child(name="control", argv=argv, env=env, fds=fds, essential=True, stop_last=True)


def announce(options: UpOptions, port: int, api_port: int) -> None:
    """Say where everything is."""
    host, _ = split_address(options.listen, "--listen")
    api_host, _ = split_address(options.api_listen, "--api-listen")
    lines = [
        f"endpoint    http://{host}:{port}/v1",
        f"console     http://{api_host}:{api_port}/   (token: {options.data_dir / 'owner-token'})",
    ]
    if options.tls:
        lines.insert(1, f"endpoint    https://{options.tls_listen}/v1")
    if options.tls == "dev":
        lines.append(f"dev CA      {options.data_dir / 'tls' / 'dev-ca.pem'}")
    if options.auth == "none":
        lines.append("client keys are off (--auth none): anybody on this machine may use the endpoint")
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


RecordFile = Annotated[
    Path | None,
    typer.Option(
        help="Append every routing decision to FILE, for `fleetgate replay`: with three Deployments about 0.8 KB and "
        "9 µs a request. Names of keys, models and Deployments and token counts; no prompts, answers or secrets."
    ),
]


@app.command()
def up(
    config: Annotated[
        Path | None, typer.Option(help="YAML file to apply at start; a file alone runs a Gateway.")
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(help="Where state is kept: database, secrets, Snapshot.")
    ] = DEFAULT_DATA_DIR,
    listen: Annotated[str, typer.Option(help="HOST:PORT for clients.")] = "127.0.0.1:7800",
    api_listen: Annotated[str, typer.Option(help="HOST:PORT for API, console and metrics; keep it private.")] = (
        "127.0.0.1:7801"
    ),
    workers: Annotated[int, typer.Option(help="Worker processes; 0 for one a core, 8 at most.")] = 0,
    region: Annotated[str, typer.Option(help="The region this proxy stands in; its own is preferred.")] = "",
    tls_listen: Annotated[str, typer.Option(help="HOST:PORT for HTTPS, together with --tls.")] = "",
    tls: Annotated[str, typer.Option(help="`dev` for a development CA, or CERT.pem,KEY.pem (reloaded).")] = "",
    auth: Annotated[str, typer.Option(help="`keys`, or `none` to let anybody in (loopback only).")] = "keys",
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call; * for all. Repeatable.")
    ] = None,
    egress_allow: Annotated[
        str,
        typer.Option(help="CIDRs, comma-separated, that Deployments given through the API may be in."),
    ] = "",
    access_log: Annotated[str, typer.Option(help="A path, `-` for standard output, or `off`.")] = "-",
    record: RecordFile = None,
    lb_grace_s: Annotated[
        float, typer.Option(help="Seconds between failing readiness and refusing; -1: 0 on loopback, else 5.")
    ] = -1.0,
    grace_s: Annotated[float, typer.Option(help="Seconds that running answers get at shutdown.")] = 30.0,
) -> None:
    """Run everything on this machine: control plane, console and proxies.

    Example: fleetgate up --config fleet.yaml, then fleetgate keys create laptop
    """
    options = UpOptions(
        config=config,
        data_dir=data_dir.expanduser().absolute(),
        listen=listen,
        api_listen=api_listen,
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
    from fleetgate.control.paper import read_fleet
    from fleetgate.simulator import simulating

    plugins.load()
    wanted = tuple(name.strip() for text in strategy or [] for name in text.split(",") if name.strip())
    ask = simulating.Ask(
        trace=trace, gateway=gateway, load=load, rate_rps=rate, strategies=wanted, region_phase=region_phase,
        proxies=proxies, faults=tuple(fault or []), seed=seed, limit=limit, json=output is Form.JSON, plot=plot,
    )  # fmt: skip
    try:
        simulating.check(ask)
        simulating.simulate(ask, read_fleet(str(fleet)))
    except (simulating.WrongUsage, simulating.Failed, Unreadable) as reason:
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
    from fleetgate.control.paper import read_fleet
    from fleetgate.simulator import replaying

    plugins.load()
    try:
        replaying.replay(
            replaying.Ask(
                records=tuple(records),
                fleet=read_fleet(str(fleet)),
                against=read_fleet(str(against)) if against is not None else None,
                region=region,
                json=output is Form.JSON,
            )
        )
    except (replaying.Failed, Unreadable) as reason:
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
