"""Load on real sockets: streamed requests at a steady rate, and what became of each."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import httpx2
import msgspec

from tests.loopback.engines import engine, metric
from tests.loopback.up_rig import Up

SERIES = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Shape(msgspec.Struct, frozen=True):
    """What a request asks. Units: the prompt is about `prompt_tokens` by the simulated engine's count."""

    prompt_tokens: int = 16
    output_tokens: int = 8
    key: str = ""
    timeout_ms: int = 0
    hangs_up_after_s: float = 0.0

    def data(self, port: int, number: int) -> bytes:
        """The request on the wire. Every prompt begins differently, so that nobody has it cached."""
        text = f"{number} ".ljust(self.prompt_tokens * 4, "x")
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        sent = json.dumps(body).encode()
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        limit = f"x-fleetgate-timeout-ms: {self.timeout_ms}\r\n" if self.timeout_ms else ""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n{key}{limit}"
        return f"{head}content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n".encode() + sent


class Outcome(msgspec.Struct):
    """What became of one request. Units: `began_s` and `ended_s` by the monotonic clock, `ttft_s` 0 without content."""

    began_s: float
    ended_s: float = 0.0
    status: int = 0
    ttft_s: float = 0.0
    deployment: str = ""
    body: bytes = b""
    retry_after: str = ""
    key: str = ""

    @property
    def took_s(self) -> float:
        """From sending to the end."""
        return self.ended_s - self.began_s

    @property
    def code(self) -> str:
        """The code of a refusal."""
        start = self.body.find(b"{")
        return str(json.loads(self.body[start : self.body.rfind(b"}") + 1])["error"]["code"]) if start >= 0 else ""


async def send(port: int, shape: Shape, number: int) -> Outcome:
    """One request to its end."""
    outcome = Outcome(time.monotonic(), key=shape.key)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(shape.data(port, number))
        async with asyncio.timeout(shape.hangs_up_after_s or 60.0):
            await _read(reader, outcome)
    except TimeoutError:
        assert shape.hangs_up_after_s, "a request got no end"
    finally:
        outcome.ended_s = time.monotonic()
        writer.transport.abort()
    return outcome


async def _read(reader: asyncio.StreamReader, outcome: Outcome) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    outcome.status = int(head.split(" ", 2)[1])
    for line in head.split("\r\n"):
        name, _, value = line.partition(": ")
        if name == "x-fleetgate-deployment":
            outcome.deployment = value
        if name == "retry-after":
            outcome.retry_after = value
    while data := await reader.read(65536):
        if not outcome.ttft_s and b'"content":"' in data:
            outcome.ttft_s = time.monotonic() - outcome.began_s
        if outcome.status != 200:
            outcome.body += data


async def offer(port: int, shapes: Sequence[Shape], rate_per_s: float, for_s: float) -> list[Outcome]:
    """Requests at a steady rate whatever becomes of them, the shapes in turn."""
    tasks: list[asyncio.Task[Outcome]] = []
    begun_s = time.monotonic()
    for number in range(int(rate_per_s * for_s)):
        await asyncio.sleep(max(0.0, begun_s + number / rate_per_s - time.monotonic()))
        tasks.append(asyncio.create_task(send(port, shapes[number % len(shapes)], number)))
    return list(await asyncio.gather(*tasks))


async def watch(look: Callable[[], float], every_s: float, until: asyncio.Task[list[Outcome]]) -> list[float]:
    """What `look` said, again and again until something ends."""
    seen = []
    while not until.done():
        seen.append(await asyncio.to_thread(look))
        await asyncio.sleep(every_s)
    return seen


def scrape(up: Up) -> SERIES:
    """The metrics page by name and labels."""
    answer = httpx2.get(f"{up.api}/metrics", timeout=10, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: SERIES = {}
    for line in answer.text.splitlines():
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        base, _, inside = name.partition("{")
        pairs = [pair.partition("=") for pair in inside.rstrip("}").split('",') if pair]
        found[base, frozenset((label, text.strip('"')) for label, _, text in pairs)] = float(value)
    return found


def value(series: SERIES, metric_name: str, **labels: str) -> float:
    """The sum of a metric's series with these labels, 0 without any."""
    wanted = set(labels.items())
    return sum(number for (name, given), number in series.items() if name == metric_name and wanted <= given)


def events(up: Up, name: str) -> list[str]:
    """The sentences told of one Deployment."""
    told = up.cli("get", "events", "-o", "json")
    assert told.returncode == 0, told.stderr
    return [each["sentence"] for each in json.loads(told.stdout) if each["object"]["name"] == name]


def shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The share of the answers that each Deployment gave."""
    counts = Counter(outcome.deployment for outcome in outcomes if outcome.status == 200)
    return {name: count / counts.total() for name, count in counts.items()}


def refusals(url: str) -> float:
    """How many requests an engine ever refused."""
    return metric(url, "fleetgate_engine_refusals_total")


@contextlib.contextmanager
def engines(*options: Sequence[str]) -> Iterator[list[str]]:
    """Several engines for model `m`; their base URLs."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(engine("--model", "m", *each)) for each in options]
