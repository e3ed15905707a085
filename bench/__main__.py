"""`make bench`: measure Fleetgate and its peers in interleaved rounds.

--quick                 a smoke run of about a minute: HAProxy, nginx, Fleetgate, one short round
--peers a,b             only these (the others are compared with direct and haproxy)
--only request,event    only these measurements
--rounds 3              medians are over this many
--head sdk|small        the 17 headers of the official SDK, or 6
--write                 put the table into bench/RESULTS.md
--against REV           compare this tree with a commit in interleaved pairs instead (only: request, event);
                        exit code 1 unless the 95 % interval of the cost ratio lies under 1.05
--pairs 20              so many pairs
"""

import argparse
import dataclasses
import datetime
import http.client
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import trustme
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import against
from bench.machine import cores_for, describe, pin
from bench.measure import KINDS, QUICK, Scale, Target, Values, applies, requests_busy
from bench.native import HERE, OUT, CannotBench, Mock, WrongAnswer, alone, build
from bench.peers.base import Absent, Peer, Running, Site
from bench.peers.debian import Haproxy, Nginx
from bench.peers.fleetgate import Fleetgate
from bench.peers.floor import Floor
from bench.peers.wheels import EngineRouter, Envoy, LiteLLM
from bench.report import DIRECT, SUBJECT, Results, markdown, show
from bench.requests import HEADS, body

PEERS: list[Peer] = [
    Haproxy(log=False),
    Haproxy(log=True),
    Nginx(),
    Floor(),
    Fleetgate(),
    Envoy(by_model=False),
    Envoy(by_model=True),
    EngineRouter("vllm-router", ["vllm-router"], warn="warning"),
    EngineRouter("sglang-router", ["sglang-router", "launch"], warn="warn"),
    LiteLLM(),
]
QUICK_PEERS = ("haproxy", "nginx", "fleetgate")
WIDTH_MIN = 200
WORKERS = "workers"  # the measurement that starts Fleetgate twice, beside those of KINDS


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--peers", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--head", choices=HEADS, default="sdk")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--against", default="", metavar="REV")
    parser.add_argument("--pairs", type=int, default=against.PAIRS)
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.quick else 3)
    known = [peer.name for peer in PEERS]
    options.peers = options.peers.split(",") if options.peers else list(QUICK_PEERS if options.quick else known)
    kinds = list(against.AGAINST_KINDS) if options.against else [*KINDS, WORKERS]
    options.only = options.only.split(",") if options.only else kinds
    if options.against and options.pairs < 2:
        parser.error("--pairs: an interval needs at least 2 pairs")
    for name, choices in (("peers", known), ("only", kinds)):
        wrong = set(getattr(options, name)) - set(choices)
        if wrong:
            parser.error(f"--{name}: {', '.join(sorted(wrong))} unknown; there are {', '.join(choices)}")
    return options


class Bench:
    """One run: the mock, the proxies that started, and the measured values."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack, console: Console) -> None:
        self.options = options
        self.console = console
        self.scale = QUICK if options.quick else Scale()
        self.cores = cores_for(1)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetgate-bench-")))
        self.mock = Mock(self.cores)
        stack.callback(self.mock.close)
        self.tls = _certificate(self.folder)
        self.stack = stack
        self.length = _answer_length(self.mock.port)
        self.targets: dict[str, Target] = {}
        facts = describe() | {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "rounds": str(options.rounds),
            "loadavg": f"{os.getloadavg()[0]:.2f}",
            "load": _load_sentence(self.scale, options.head),
        }
        self.results = Results(facts, {}, {})

    def site(self, workers: int) -> Site:
        """The place for a proxy with this number of workers."""
        return Site(self.folder, self.mock.port, cores_for(workers), workers, self.tls)

    def start(self, peer: Peer, workers: int = 1) -> Target | None:
        """Start one proxy, or record why it is absent."""
        try:
            self.results.versions[peer.name] = peer.version()
            running = peer.start(self.site(workers))
        except Absent as absent:
            self.results.absent[peer.name] = str(absent)
            return None
        self.stack.callback(running.stop)
        self.results.abouts[peer.name] = peer.about
        return self._target(running, exact=peer.exact, slow=peer.slow)

    def _target(self, running: Running, exact: bool, slow: bool) -> Target:
        length = self.length if exact else 0
        return Target(running, length, exact, slow, self.folder, self.options.head, self.cores)

    def start_all(self) -> None:
        """Start every requested peer; the mock itself is the first entry."""
        direct = Running(DIRECT, self.mock.port)
        self.targets[DIRECT] = self._target(direct, exact=True, slow=False)
        for peer in PEERS:
            if peer.name in self.options.peers:
                self.console.print(f"starting {peer.name} …")
                target = self.start(peer)
                if target is not None:
                    self.targets[peer.name] = target
        self.results.values = {name: {} for name in self.targets}

    def plan(self) -> list[tuple[str, str]]:
        """Every measurement of one round: each kind with all proxies in turn."""
        return [
            (kind, name)
            for kind in KINDS
            if kind in self.options.only
            for name, target in self.targets.items()
            if applies(kind, target.running, target.slow)
        ]

    def measure(self, kind: str, name: str) -> None:
        """Measure once and record the values or the failure."""
        target = self.targets[name]
        values: Values | None = None
        try:
            values = KINDS[kind](target, self.scale)
        except WrongAnswer as wrong:
            self.results.failed.append(f"{name}, {kind}: {wrong}")
        self.results.add(name, kind, values)

    def measure_workers(self, count: int) -> None:
        """Throughput and CPU with one and with two workers, both on the cores for two."""
        cores = cores_for(2)
        pin(self.mock.pid, cores.load)
        second = self.start(Fleetgate(), workers=2)
        if second is None:
            return
        targets = {1: self.targets[SUBJECT], 2: second}
        for target in targets.values():
            for pid in target.running.charged():
                pin(pid, cores.proxy)
        for _ in range(count):
            for workers, target in targets.items():
                values: Values | None = None
                try:
                    values = requests_busy(dataclasses.replace(target, cores=cores), self.scale)
                except WrongAnswer as wrong:
                    self.results.failed.append(f"{workers} workers: {wrong}")
                self.results.add(f"{SUBJECT}-{workers}", WORKERS, values)


def _certificate(folder: Path) -> Path:
    """One certificate and key for every proxy, so that TLS costs each of them the same arithmetic."""
    issued = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    path = folder / "tls.pem"
    path.touch(mode=0o600)
    path.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    return path


def _answer_length(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", "/v1/chat/completions", body())
    length = len(connection.getresponse().read())
    connection.close()
    return length


def _load_sentence(scale: Scale, head: str) -> str:
    return (
        f"{len(body())}-byte body, `{head}` head; requests on {scale.conns} busy keep-alive connections; "
        f"events of {scale.streams} streams with {scale.events_per_s} a second each, "
        "evenly spread or in bursts of a fifth of them; "
        f"memory with {scale.open_streams:,} open streams; "
        "a peer marked as light got 8 connections and 20 streams with 10 events a second each"
    )


def run(options: argparse.Namespace, console: Console) -> Results:
    """Build, start, measure in rounds, stop."""
    with ExitStack() as stack:
        stack.enter_context(alone())
        build()
        bench = Bench(options, stack, console)
        bench.start_all()
        plan = bench.plan()
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(plan) * options.rounds)
            for turn in range(options.rounds):
                if not console.is_terminal:
                    progress.print(f"round {turn + 1} of {options.rounds}: {len(plan)} measurements")
                for kind, name in plan:
                    progress.update(task, description=f"{kind}: {name}")
                    bench.measure(kind, name)
                    progress.advance(task)
            if WORKERS in options.only and SUBJECT in bench.targets:
                progress.update(task, description="one worker, two workers")
                bench.measure_workers(options.rounds)
        return bench.results


def main() -> int:
    """Run the benchmark; 0 when every measurement succeeded."""
    options, console = arguments(), Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that started processes are ended too
    if not console.is_terminal:
        console.width = WIDTH_MIN  # the table is wide; a file has no width
    try:
        if options.against:
            return against.run(options, console)
        results = run(options, console)
    except (CannotBench, Absent) as missing:
        console.print(str(missing))
        return 1
    show(results, console)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    results.save(OUT / f"run-{stamp}.json")
    console.print(f"all values: {OUT / f'run-{stamp}.json'}")
    if options.write:
        command = " ".join(["make bench", *([f"ARGS='{' '.join(sys.argv[1:])}'"] if sys.argv[1:] else [])])
        (HERE / "RESULTS.md").write_text(markdown(results, command))
    return 1 if results.failed or SUBJECT in results.absent else 0


if __name__ == "__main__":
    sys.exit(main())
