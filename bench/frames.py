"""`python -m bench.frames`: Python frames and builtin calls of a warm request and of a streamed event.

Counts are exact and do not depend on the machine's load: `fleetgate up` with one worker under a tracer, requests one
after the other. The table has the smallest count that at least 2 % of them have: what runs now and then beside a
request (timers, the start of a commit of the usage journal, at most one in 5 ms) is left out.

--against REV   count that commit too; exit code 1 when this tree needs more of either
--calls         list the calls by module and function; with --against only those that differ
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.machine import cores_for
from bench.native import CannotBench, Mock, build
from bench.peers.base import Absent, Running, Site
from bench.peers.fleetgate import CONFIG, Fleetgate
from bench.requests import body, write_request
from bench.revision import SOURCE, describe, extract

TRACER = Path(__file__).parent / "tracer"
WARM = 100  # requests before the first that counts: memos are filled, speeds learned
COUNTED = 600
SHARE_MIN = 0.02  # rarer counts may be broken ones: a request whose end fell into the next segment
EVENTS = 60
EVENT_EVERY_US = 20_000  # one event a read
ANSWER_S_MAX = 30.0
SETTLE_S = 3.0  # the first probes
_DEPLOYMENT, _GATEWAY = CONFIG.split("---\n")
TWO_EQUAL = "---\n".join(
    (
        _DEPLOYMENT,
        _DEPLOYMENT.replace("name: mock", "name: other"),
        _GATEWAY.replace("strategy: overflow", "strategy: capacity_round_robin").replace(
            "[{{deployment: mock}}]", "[{{deployment: mock, rank: 1}}, {{deployment: other, rank: 1}}]"
        ),
    )
)
CASES = {"request, with a lead": CONFIG, "request, without a lead": TWO_EQUAL}
EVENT = "streamed event"


class Count(NamedTuple):
    """The count of a case. Shape: `calls` are the functions of one with that count; `share` of all have it."""

    frames: int
    builtins: int
    calls: Mapping[str, int]
    share: float


class Client:
    """One keep-alive connection that sends one request after the other."""

    def __init__(self, running: Running, folder: Path) -> None:
        self._socket = socket.create_connection(("127.0.0.1", running.port), timeout=ANSWER_S_MAX)
        self._running = running
        self._folder = folder

    def request(self, content: bytes) -> None:
        """Send one request and read its whole answer.

        Raises: `CannotBench` when the answer is not a 200.
        """
        path = self._folder / "frames.request"
        self._socket.sendall(write_request(path, "sdk", self._running.port, self._running.key, content).read_bytes())
        received = b""
        while not _is_whole(received):
            data = self._socket.recv(65536)
            if not data:
                raise CannotBench("the gateway closed the connection early")
            received += data
        if b" 200 " not in received.partition(b"\r\n")[0]:
            raise CannotBench(f"the gateway answered {received[:200]!r}")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _is_whole(received: bytes) -> bool:
    head, mark, rest = received.partition(b"\r\n\r\n")
    if not mark:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(rest) >= int(line.partition(b":")[2])
    return rest.endswith(b"0\r\n\r\n")


def plain_count(segments: list[tuple[str, int, int, list[str]]], kind: str) -> Count:
    """The smallest count that requests or events have repeatedly."""
    counts = Counter((frames, builtins) for name, frames, builtins, _ in segments if name == kind)
    if not counts:
        raise CannotBench(f"the tracer saw no {kind}; does the worker run another interpreter?")
    usual = {found: times for found, times in counts.items() if times >= SHARE_MIN * counts.total()}
    (frames, builtins), times = min(usual.items(), key=lambda pair: sum(pair[0]))
    calls = next(calls for name, *found, calls in segments if name == kind and tuple(found) == (frames, builtins))
    return Count(frames, builtins, Counter(calls), times / counts.total())


def _collect(out: Path) -> list[tuple[str, int, int, list[str]]]:
    out.unlink(missing_ok=True)
    Path(f"{out}.ask").touch()
    until_s = time.monotonic() + ANSWER_S_MAX
    while not out.exists():
        if time.monotonic() > until_s:
            raise CannotBench("the tracer in the worker does not answer")
        time.sleep(0.02)
    return [tuple(segment) for segment in json.loads(out.read_text())]


def count(source: Path, folder: Path, mock: Mock) -> dict[str, Count]:
    """Count every case on one source tree."""
    found: dict[str, Count] = {}
    for number, (case, config) in enumerate(CASES.items()):
        place = folder / f"case-{number}"
        place.mkdir(parents=True)
        out = place / "frames.json"
        env = {"FLEETGATE_FRAMES_OUT": str(out), "PYTHONPATH": f"{TRACER}:{source}"}
        running = Fleetgate(source, config, env).start(Site(place, mock.port, cores_for(1), 1, None))
        with ExitStack() as stack:
            stack.callback(running.stop)
            time.sleep(SETTLE_S)
            client = Client(running, place)
            stack.callback(client.close)
            for _ in range(WARM):
                client.request(body())
            _collect(out)
            for _ in range(COUNTED):
                client.request(body())
            found[case] = plain_count(_collect(out), "request")
            if EVENT not in found:
                client.request(body(EVENTS, EVENT_EVERY_US))
                _collect(out)
                client.request(body(EVENTS, EVENT_EVERY_US))
                found[EVENT] = plain_count(_collect(out), "event")
    return found


def show(results: Mapping[str, Mapping[str, Count]], console: Console, calls: bool) -> None:
    """Print a table, and each case's calls if `calls` is set."""
    table = Table("", *results, title="Python frames + builtin calls (the share that has exactly this count)")
    for case in (*CASES, EVENT):
        counts = [found[case] for found in results.values()]
        table.add_row(case, *(f"{one.frames} + {one.builtins} ({one.share:.0%})" for one in counts))
    console.print(table)
    before, now = next(iter(results.values())), results["this tree"]
    for case in (*CASES, EVENT) if calls else ():
        console.print(f"\n{case}:")
        for name in sorted({**before[case].calls, **now[case].calls}):
            times, change = now[case].calls.get(name, 0), now[case].calls.get(name, 0) - before[case].calls.get(name, 0)
            if before is now:
                console.print(f"{times:5}  {name}", markup=False, highlight=False)
            elif change:
                console.print(f"{change:+5}  {name}", markup=False, highlight=False)


def main() -> int:
    """Count and print; 1 when this tree needs more calls than the commit it is compared with."""
    parser = argparse.ArgumentParser(
        prog="bench.frames", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--against", default="", metavar="REV")
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args()
    console = Console()
    try:
        with ExitStack() as stack:
            build()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetgate-frames-")))
            mock = Mock(cores_for(1))
            stack.callback(mock.close)
            sources = {"this tree": SOURCE}
            if options.against:
                sources = {describe(options.against): extract(options.against, folder / "rev"), **sources}
            results = {
                side: count(source, folder / f"run-{number}", mock)
                for number, (side, source) in enumerate(sources.items())
            }
    except (CannotBench, Absent) as missing:
        console.print(str(missing))
        return 1
    show(results, console, options.calls)
    before, now = results[next(iter(results))], results["this tree"]
    more = any(now[case].frames > before[case].frames or now[case].builtins > before[case].builtins for case in now)
    return int(more)


if __name__ == "__main__":
    sys.exit(main())
