"""`python -m bench.faults`: how soon faults are detected and what they cost, with real processes.

The blackhole needs root (a network namespace); without it that figure is marked as not measured.
"""

import argparse
import asyncio
import contextlib
import datetime
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from tests.faults.crowd import RETRIES, Crowd, engine, out_of_order
from tests.faults.far_region import FarRegion, why_not
from tests.faults.test_namespaces import Far
from tests.faults.test_namespaces import use as use_far
from tests.loopback.test_resume import events_of
from tests.loopback.wall import Line, Seen, Wall
from tests.loopback.wall_client import Client, ask, request
from tests.loopback.wall_replies import CHUNKED, EVENT_STREAM, chunk
from tests.loopback.wall_rig import Plane, plane

from bench.machine import cores_for
from bench.native import OUT, Mock, build

RATE = 100.0
RESULTS = Path(__file__).parent / "RESULTS.md"
HEADING = "## What faults cost"
PHASES = {
    "before the first event": ("silent", True),
    "after the role event": ("held-early", True),
    "in the stream": ("held", True),
    "while a whole answer is made": ("held", False),
}
QUIET_S = 1.2  # after this long without a request that had to move the fault is detected; trials begin 1.6 s later


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    goal: str


def spread(times_s: Sequence[float]) -> str:
    """p50 and p99 in milliseconds."""
    ranked = sorted(times_s)
    at = [ranked[min(len(ranked) - 1, int(share * len(ranked)))] * 1000 for share in (0.5, 0.99)]
    return f"{at[0]:.1f} / {at[1]:.1f} ms ({len(ranked)})"


def took_s(made: Plane, data: bytes) -> tuple[float, int]:
    """How long a request took, and its attempts."""
    began_s = time.monotonic()
    answer = ask(made.port, data)
    assert answer.status == 200, answer
    return time.monotonic() - began_s, int(answer.headers["x-fleetgate-attempts"])


def until_known_s(made: Plane) -> float:
    """The time until the last request that had to move; four threads send one request after the other."""
    began_s = time.monotonic()
    last_s = [0.0]

    def load() -> None:
        while time.monotonic() - began_s < last_s[0] + QUIET_S:
            if took_s(made, request("m"))[1] > 1:
                last_s[0] = max(last_s[0], time.monotonic() - began_s)
            time.sleep(0.02)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return last_s[0]


def refused(made: Plane, rounds: int) -> Iterator[Figure]:
    """Connections are refused."""
    usual_s, extra_s, found_s = [], [], []
    for _ in range(rounds):
        made.use({}, {})
        usual_s.append(took_s(made, request("m"))[0])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for _ in range(rounds):
            _dead_first(made, unused.getsockname()[1])
            spent_s, attempts = took_s(made, request("m"))
            assert attempts == 2
            extra_s.append(spent_s - statistics.median(usual_s))
        for _ in range(3):
            _dead_first(made, unused.getsockname()[1])
            found_s.append(until_known_s(made))
    yield Figure("detection, connection refused", f"{max(found_s):.2f} s (worst of 3)", "≤ 1 s")
    yield Figure("extra TTFB of a failover, refused (p50 / p99)", spread(extra_s), "≤ 20 ms")


def _dead_first(made: Plane, port: int) -> None:
    one, two = made.deployments({}, {})
    endpoint = msgspec.structs.replace(one.endpoints[0], port=port)
    made.publish([msgspec.structs.replace(one, endpoints=(endpoint,)), two])


def blackhole(made: Plane, rounds: int) -> Iterator[Figure]:
    """No answer to a SYN."""
    if why_not():
        yield Figure("detection, blackhole", f"not measured: {why_not()}", "≤ 3 s")
        return
    with FarRegion() as region, Wall(listen=region.listen) as there:
        walls, made.walls = made.walls, [there, *made.walls]
        extra_s, found_s = [], []
        far = Far(made, region)
        for _ in range(rounds):
            use_far(far)
            region.lose(requests=True, replies=True)
            extra_s.append(took_s(made, request("m"))[0])
        for _ in range(3):
            use_far(far)
            region.lose(requests=True, replies=True)
            found_s.append(until_known_s(made))
        region.lose(requests=False, replies=False)
        made.walls = walls
    yield Figure("detection, blackhole", f"{max(found_s):.2f} s (worst of 3)", "≤ 3 s")
    yield Figure("extra TTFB of a failover, blackhole (p50 / p99)", spread(extra_s), "≤ 1.0 s")


async def stalling(line: Line, seen: Seen) -> None:
    """Send half of the answer, then nothing."""
    line.write(EVENT_STREAM + CHUNKED)
    for one in events_of(seen)[:12]:
        line.write(chunk(one))
        await asyncio.sleep(0.02)
    await line.gone.wait()


def stall(made: Plane) -> Iterator[Figure]:
    """A stream stalls, at a Deployment that has not streamed before and at one of known pace."""
    for what, streams in (("of unknown pace", 0), ("whose pace is known", 40)):
        for wall in made.walls:
            wall.replies["stall"] = engine
        made.use({"models": {"m": "stall"}}, {"models": {"m": "stall"}})
        for _ in range(streams):
            took_s(made, request("m", stream=True, temperature=0))
        made.walls[0].replies["stall"] = stalling
        longest_s, last_s = 0.0, 0.0
        with made.client() as client:
            client.send(request("m", stream=True, temperature=0))
            while b"[DONE]" not in client._buffer and client.receive():
                now_s = time.monotonic()
                longest_s = max(longest_s, now_s - last_s if last_s else 0.0)
                last_s = now_s
        yield Figure(f"a stalled stream continues, Deployment {what}", f"{longest_s:.1f} s", "≤ 15 s")


def brownout(made: Plane) -> Iterator[Figure]:
    """Tokens become ten times slower."""
    pace_s = [0.02]
    usual = made.wall.replies["ok"]

    async def paced(line: Line, seen: Seen) -> None:
        seen.ask.setdefault("wall", {})["pace_s"] = pace_s[0]
        await usual(line, seen)

    made.wall.replies["paced"] = paced
    made.use({"models": {"m": "paced"}}, {"models": {"m": "ok"}})
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            took_s(made, request("m", stream=True, wall={"count": 60, "pace_s": 0.02}))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(20.0)
    pace_s[0], began_s = 0.2, time.monotonic()
    found_s = 0.0
    while time.monotonic() - began_s < 40 and not found_s:
        time.sleep(0.1)
        if ask(made.port, request("m")).headers["x-fleetgate-deployment"] == "two":
            found_s = time.monotonic() - began_s
    stop.set()
    for thread in threads:
        thread.join()
    yield Figure("detection, brownout 10×", f"{found_s:.1f} s" if found_s else "not within 40 s", "≤ 10 s")


def disconnects(made: Plane, rounds: int) -> Iterator[Figure]:
    """The time from a client's disconnect until its upstream connection is closed."""
    for phase, (model, stream) in PHASES.items():
        made.use()
        made.wall.hold()
        times_s = []
        for number in range(rounds):
            with Client(made.port) as client:
                client.send(request(model, stream))
                while len(made.wall.seen) <= number or (model == "held" and stream and not client.receive()):
                    time.sleep(0.002)
                time.sleep(0.02)
                left_s = time.monotonic()
            while not made.wall.seen[number].gone_s:
                time.sleep(0.002)
            times_s.append(made.wall.seen[number].gone_s - left_s)
        made.wall.release()
        yield Figure(f"client disconnects {phase}: upstream closed (p50 / p99)", spread(times_s), "p99 ≤ 100 ms")


def outage(made: Plane, for_s: float) -> Iterator[Figure]:
    """One region is down; then no region works and clients retry as SDKs do."""
    for wall in made.walls:
        wall.replies["ok"] = engine
    made.use({}, {}, {}, strategy="capacity_round_robin")
    made.walls[0].fall()
    crowd = Crowd(made.port, "outage", 1)
    asyncio.run(crowd.run(RATE, for_s))
    made.walls[0].rise()
    share = sum(row.attempts for row in crowd.asked) / len(crowd.asked)
    lost = sum(row.end != "exact" for row in crowd.asked)
    found = f"{share:.3f} ({len(crowd.asked)}, {lost} lost)"
    yield Figure("attempts a request, one region of three away", found, "≤ 1.05")
    made.use({}, {}, {}, strategy="capacity_round_robin")
    for wall in made.walls:
        wall.replies["ok"] = out_of_order
    crowd = Crowd(made.port, "total", 1)
    offered = asyncio.run(crowd.run(RATE, for_s / 2, RETRIES))
    reached = sum(len(wall.seen) for wall in made.walls)
    yield Figure("requests at engines for one offered, every engine fails", f"{reached / offered:.2f}×", "≤ 1.1×")


def memory(requests: int) -> Iterator[Figure]:
    """The growth of a worker's memory over many requests."""
    OUT.mkdir(exist_ok=True)
    build()
    mock = Mock(cores_for(1))
    with contextlib.closing(mock), plane(walls=1) as made:
        (one,) = made.deployments({})
        endpoint = msgspec.structs.replace(one.endpoints[0], port=mock.port)
        made.publish([msgspec.structs.replace(one, endpoints=(endpoint,))])
        pid = made.rig.processes[0].pid
        _many(made, requests // 4)
        began_kb, began_fds = _own_kb(pid), _fds(pid)
        seen_kb = []
        for _ in range(8):
            _many(made, requests // 8)
            seen_kb.append(_own_kb(pid))
        time.sleep(6.0)  # kept connections close
        fds = _fds(pid)
    grown = (seen_kb[-1] - began_kb) / began_kb
    steps = ", ".join(f"{(kb - began_kb) / began_kb:+.2%}" for kb in seen_kb)
    what = f"a worker's own memory (RssAnon) over {requests:,} requests after {requests // 4:,}"
    yield Figure(what, f"{grown:+.2%} ({steps})", "< 1 %")
    yield Figure("descriptors at the start and after", f"{began_fds} → {fds}", "no more")


def _many(made: Plane, count: int) -> None:
    data = request("m")

    def load() -> None:
        with Client(made.port) as client:
            for _ in range(count // 8):
                answer = client.ask(data)
                assert answer.status == 200

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _own_kb(pid: int) -> int:
    """Memory without pages of files, because the journal's segment (4 MB at most) is mapped as it is written."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0])


def _fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def table(figures: Sequence[Figure]) -> str:
    """The figures as a table in Markdown."""
    rows = [f"| {one.what} | {one.found} | {one.goal} |" for one in figures]
    return "\n".join(["| figure | measured | goal |", "|---|---|---|", *rows])


def write(text: str) -> None:
    """Replace the section in RESULTS.md."""
    old = RESULTS.read_text()
    before, mark, rest = old.partition(f"{HEADING}\n")
    rest = rest[rest.index("\n## ") + 1 :] if mark else old[old.index("## Targets") :]
    before = before if mark else old[: old.index("## Targets")]
    day = datetime.datetime.now(datetime.UTC).date()
    RESULTS.write_text(f"{before}{HEADING}\n\n`python -m bench.faults --write` on {day}, 2 cores.\n\n{text}\n\n{rest}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of the outage")
    parser.add_argument(
        "--requests", type=int, default=200_000, help="number of requests over which memory is measured"
    )
    parser.add_argument("--only", default="", help="comma-separated names of parts")
    parser.add_argument("--write", action="store_true", help="write the table into bench/RESULTS.md")
    options = parser.parse_args()
    figures: list[Figure] = []
    parts: dict[str, Callable[[Plane], Iterator[Figure]]] = {
        "refused": lambda made: refused(made, options.rounds),
        "blackhole": lambda made: blackhole(made, options.rounds),
        "stall": stall,
        "brownout": brownout,
        "disconnects": lambda made: disconnects(made, options.rounds * 3),
        "outage": lambda made: outage(made, options.seconds),
        "memory": lambda made: memory(options.requests),
    }
    for name, part in parts.items():
        if options.only and name not in options.only.split(","):
            continue
        with plane(walls=3) as made:
            for one in part(made):
                figures.append(one)
                sys.stderr.write(f"{one.what}: {one.found}\n")
    sys.stdout.write(table(figures) + "\n")
    if options.write:
        write(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
