"""`python -m bench.region_kill`: kill -9 of one region of three, repeatedly and under load, and what the clients see.

Real processes on loopback: `fleetgate up` with two workers, three simulated engines as regions that give the same
answer to a prompt, and a client that compares every answer with the expected one. Half of the requests are streams with
`temperature: 0`, half are not streamed. One seed gives one schedule.
"""

import argparse
import asyncio
import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import Progress

REGIONS = ("us-east", "eu-west", "ap-south")
PROMPTS = 64
TOKENS = 24
DECODE_STEP_S = 0.01
ENGINE_SLOTS = 256
BACK_AFTER_S = 2.0
REQUEST_S_MAX = 60.0
READY_S_MAX = 60.0
PROBED_S = 3.0  # after this the first probes have ended, and the other worker has the Snapshot too


class Region:
    """An engine that can be killed and started again at the same address."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._address = "127.0.0.1:0"
        self.url = ""
        self._process: subprocess.Popen[str]
        self.start()

    def start(self) -> None:
        """Start it, at its previous address if it had one."""
        argv = [sys.executable, "-m", "fleetgate.engine", "--listen", self._address, "--model", "m"]
        options = ["--region", self.name, "--decode-base-s", str(DECODE_STEP_S), "--slots", str(ENGINE_SLOTS)]
        self._process = subprocess.Popen([*argv, *options], stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]
        self._address = self.url.removeprefix("http://").removesuffix("/v1")

    def kill(self) -> None:
        """kill -9."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Outcome(NamedTuple):
    """The result of one request. Shape: `kind` is streamed or whole, `end` exact, lost, wrong, silent or said."""

    kind: str
    end: str
    attempts: int
    resumed: bool
    gap_s: float


def body_of(prompt: int, stream: bool) -> bytes:
    """One request."""
    fields = {"model": "m", "messages": [{"role": "user", "content": f"question {prompt}"}], "max_tokens": TOKENS}
    return msgspec.json.encode({**fields, "temperature": 0, "stream": stream})


async def send(port: int, body: bytes) -> tuple[int, dict[str, str], list[tuple[float, bytes]], bool]:
    """Status, headers, payload pieces with their time, and whether the framing was complete."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: chat.example.com\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\nconnection: close\r\n\r\n" + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        pieces: list[tuple[float, bytes]] = []
        whole = False
        try:
            if "content-length" in headers:
                pieces.append((time.monotonic(), await reader.readexactly(int(headers["content-length"]))))
                whole = True
            else:
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    pieces.append((time.monotonic(), (await reader.readexactly(size + 2))[:-2]))
                whole = True
        except (asyncio.IncompleteReadError, ConnectionError):
            whole = False
        return int(lines[0].split()[1]), headers, pieces, whole
    finally:
        writer.close()


def read_stream(payload: bytes) -> tuple[str, str | None, str | None]:
    """Text, finish_reason and error code of a stream."""
    text, reason, code = "", None, None
    for event in payload.split(b"\n\n"):
        if event.startswith(b"data: {"):
            data = json.loads(event[6:])
            code = data["error"]["code"] if "error" in data else code
            for choice in data.get("choices", ()):
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
    return text, reason, code


async def one(port: int, prompt: int, stream: bool, expected: dict[int, str]) -> Outcome:
    """Send one request and classify its answer."""
    kind = "streamed" if stream else "whole"
    try:
        async with asyncio.timeout(REQUEST_S_MAX):
            status, headers, pieces, whole = await send(port, body_of(prompt, stream))
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Outcome(kind, "lost", 0, False, 0.0)
    attempts = int(headers.get("x-fleetgate-attempts", "0"))
    payload = b"".join(piece for _, piece in pieces)
    resumed = b": fleetgate deployment=" in payload
    gap_s = max((b[0] - a[0] for a, b in pairwise(pieces)), default=0.0)
    if status != 200:
        return Outcome(kind, "lost", attempts, resumed, gap_s)
    if stream:
        text, reason, code = read_stream(payload)
        if code is not None:
            return Outcome(kind, "lost" if not text else "said", attempts, resumed, gap_s)
        if not whole or reason is None:
            return Outcome(kind, "silent" if whole else "cut without an error", attempts, resumed, gap_s)
    else:
        text = json.loads(payload)["choices"][0]["message"]["content"]
    known = expected.setdefault(prompt, text)
    return Outcome(kind, "exact" if text == known else "wrong", attempts, resumed, gap_s)


@contextmanager
def gateway(regions: Sequence[Region], workers: int) -> Iterator[int]:
    """`fleetgate up` over the regions; the port of its clients."""
    parts: list[dict[str, object]] = [
        {"kind": "Deployment", "name": one.name, "region": one.name, "models": [{"name": "m"}], "engine": "vllm"}
        | {"url": one.url, "capacity": {"concurrency": ENGINE_SLOTS}}
        for one in regions
    ]
    upstreams = [{"deployment": one.name, "rank": rank} for rank, one in enumerate(regions, 1)]
    parts.append({"kind": "Gateway", "name": "chat", "domain": "example.com", "protocol": "openai"})
    parts[-1] |= {"strategy": "capacity_round_robin", "upstreams": upstreams}
    with tempfile.TemporaryDirectory(prefix="fleetgate-bench-") as directory, ExitStack() as stack:
        file = Path(directory) / "fleet.yaml"
        file.write_text("\n---\n".join(json.dumps(part) for part in parts))
        argv = [sys.executable, "-m", "fleetgate.main", "up", "--config", str(file), "--data-dir", f"{directory}/data"]
        argv += ["--listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0", "--auth", "none"]
        log = stack.enter_context((Path(directory) / "up.log").open("w+"))
        process = subprocess.Popen([*argv, "--workers", str(workers)], stdout=log, stderr=log, text=True)
        try:
            yield _port_of(process, Path(directory) / "up.log")
        finally:
            process.terminate()
            process.wait(30)


def _port_of(process: subprocess.Popen[str], log: Path) -> int:
    """Wait until it serves the Gateway, and return its port."""
    deadline_s = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline_s and process.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://127.0.0.1:") and word.rstrip("/,.").endswith("/v1"):
                port = int(word.rstrip("/,.").removesuffix("/v1").rpartition(":")[2])
                if _has_gateway(port):
                    time.sleep(PROBED_S)
                    return port
        time.sleep(0.1)
    raise SystemExit(f"fleetgate up did not start: {log.read_text()}")


def _has_gateway(port: int) -> bool:
    """Whether a worker has taken the Snapshot with the Gateway; before that it answers 404."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers={"host": "chat.example.com"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def load(port: int, options: argparse.Namespace, regions: Sequence[Region]) -> list[Outcome]:
    """Send requests at a steady rate while regions are killed."""
    dice = random.Random(options.seed)
    expected: dict[int, str] = {}
    for prompt in range(PROMPTS):
        await one(port, prompt, False, expected)
    tasks: list[asyncio.Task[Outcome]] = []
    began_s = time.monotonic()
    count = int(options.rate * options.seconds)
    killer = asyncio.create_task(_kill(options, regions, dice))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("requests", total=count)
        for number in range(count):
            await asyncio.sleep(began_s + number / options.rate - time.monotonic())
            tasks.append(asyncio.create_task(one(port, dice.randrange(PROMPTS), number % 2 == 0, expected)))
            bar.update(shown, completed=number)
    outcomes = await asyncio.gather(*tasks)
    await killer
    return outcomes


async def _kill(options: argparse.Namespace, regions: Sequence[Region], dice: random.Random) -> None:
    for _ in range(options.kills):
        await asyncio.sleep(dice.uniform(0.6, 1.0) * options.seconds / options.kills - BACK_AFTER_S)
        victim = dice.choice(regions)
        await asyncio.to_thread(victim.kill)
        await asyncio.sleep(BACK_AFTER_S)
        await asyncio.to_thread(victim.start)


def report(outcomes: Sequence[Outcome], options: argparse.Namespace) -> str:
    """The results as a table."""
    lines = [f"seed {options.seed}: {options.rate:g} requests/s for {options.seconds:g} s, {options.kills} kills", ""]
    lines += ["| requests | sent | ended |", "|---|---|---|"]
    for kind in ("whole", "streamed"):
        ends = Counter(one.end for one in outcomes if one.kind == kind)
        lines.append(f"| {kind} | {sum(ends.values()):,} | {', '.join(f'{n:,} {end}' for end, n in ends.items())} |")
    moved = sum(one.attempts > 1 for one in outcomes)
    gaps_s = sorted(one.gap_s for one in outcomes if one.resumed)
    lines += [
        "",
        "exact: the expected text; said: ended with an error in the stream; lost: an error before any content.",
        f"{moved} moved before their first byte; {len(gaps_s)} streams continued elsewhere",
    ]
    if gaps_s:
        at = [gaps_s[min(len(gaps_s) - 1, int(share * len(gaps_s)))] for share in (0.5, 0.99)]
        lines[-1] += f", with a gap of {at[0] * 1000:.0f} ms (p50) and {at[1] * 1000:.0f} ms (p99)"
    return "\n".join(lines)


def main() -> int:
    """Run and print; 1 when anything was lost, silent or wrong."""
    parser = argparse.ArgumentParser(prog="bench.region_kill", description=__doc__)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=210.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    regions = [Region(name) for name in REGIONS]
    try:
        with gateway(regions, options.workers) as port:
            outcomes = asyncio.run(load(port, options, regions))
    finally:
        for region in regions:
            region.kill()
    sys.stdout.write(report(outcomes, options) + "\n")
    return int(any(one.end in ("lost", "silent", "wrong") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
