"""One measurement of one proxy: apply a known load and read the CPU time and memory it used."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import Cores, CpuTime, cpu_time, cpu_used_s, memory_mb
from bench.native import WrongAnswer, run_load
from bench.peers.base import Running
from bench.requests import body, write_request

Values = dict[str, float]

SETTLE_S = 0.3  # load.c waits this long after the last stream has begun
EVENTS_BESIDE_CONTENT = 3  # role, finish, [DONE]
# Streams begin this share of an interval apart. Multiples of the first (close to a noble number) are spread evenly over
# the interval, so that nearly every event is a separate wake-up. The second puts a fifth of all streams at one instant.
EVEN_STEP = 0.236
BURST_STEP = 0.2
CARRIED_MIN = 0.95  # below this share of the requested rate, latencies measure only the queue's length
IDLE_S = 2.0


@dataclass(frozen=True)
class Scale:
    """How long and how much. Shape: `streams` × `events_per_s` are paced; `open_streams` are only held."""

    warm_s: float = 0.7
    window_s: float = 2.5
    conns: int = 64
    streams: int = 100
    events_per_s: int = 20
    stream_window_s: float = 4.0
    open_streams: int = 1000


QUICK = Scale(warm_s=0.3, window_s=1.0, stream_window_s=1.5, open_streams=300)


@dataclass(frozen=True)
class Target:
    """A running proxy to measure, and how its answers are checked. Shape: `length` 0 accepts any."""

    running: Running
    length: int
    exact: bool
    slow: bool
    folder: Path
    head: str
    cores: Cores


class CpuWindow:
    """Reads the CPU time of the charged processes as the window opens and closes."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._reads: dict[str, CpuTime] = {}
        self.memory = (0.0, 0.0)

    def on_mark(self, mark: str, _: dict[str, Any]) -> None:
        """Called by the load client's marks."""
        if mark != "done":
            pids = self._running.charged()
            self._reads[mark] = cpu_time(pids)
            self.memory = memory_mb(pids)

    def used_s(self) -> float:
        """CPU time inside the window."""
        return cpu_used_s(self._reads["begin"], self._reads["end"])


def _load(target: Target, window: CpuWindow, content: bytes, tls: bool = False, **options: object) -> dict[str, Any]:
    running = target.running
    port = running.tls_port if tls else running.port
    path = write_request(target.folder / f"{running.name}.request", target.head, port, running.key, content)
    named = {name.replace("_", "-"): value for name, value in options.items()}
    arguments: dict[str, object] = {"port": port, "request": path, **named}
    return run_load(arguments | ({"tls": True} if tls else {}), target.cores, window.on_mark)


def _closed(target: Target, scale: Scale, tls: bool) -> Values:
    window = CpuWindow(target.running)
    done = _load(
        target,
        window,
        body(),
        tls=tls,
        mode="closed",
        conns=8 if target.slow else scale.conns,
        warm_ms=int(scale.warm_s * 1000),
        window_ms=int(scale.window_s * 1000),
        length=target.length,
    )
    used_s, requests = window.used_s(), done["window_requests"]
    return {
        "cpu_us": used_s * 1e6 / requests,
        "per_s": requests / done["window_s"],
        "core_share": used_s / done["window_s"],
        "connections": done["opened"],
    }


def requests_busy(target: Target, scale: Scale) -> Values:
    """CPU of one request, all connections busy."""
    return _closed(target, scale, tls=False)


def requests_tls(target: Target, scale: Scale) -> Values:
    """CPU of one request over TLS, on established connections."""
    return _closed(target, scale, tls=True)


def streams_even(target: Target, scale: Scale) -> Values:
    """CPU of one event of many paced streams, their events evenly spread over time."""
    return _streams(target, scale, EVEN_STEP)


def streams_in_step(target: Target, scale: Scale) -> Values:
    """CPU of one event of many paced streams whose events come in bursts, as an engine's batch sends them."""
    return _streams(target, scale, BURST_STEP)


def _streams(target: Target, scale: Scale, phase_step: float) -> Values:
    streams, per_s = (20, 10) if target.slow else (scale.streams, scale.events_per_s)
    spread_s = streams * phase_step / per_s
    events = math.ceil((spread_s + SETTLE_S + scale.stream_window_s + 0.7) * per_s)
    window = CpuWindow(target.running)
    done = _load(
        target,
        window,
        body(events, 1_000_000 // per_s),
        mode="stream",
        conns=streams,
        spread_ms=int(spread_s * 1000),
        window_ms=int(scale.stream_window_s * 1000),
        events=events + EVENTS_BESIDE_CONTENT if target.exact else 0,
    )
    return {"cpu_us": window.used_s() * 1e6 / done["window_events"], "per_s": done["window_events"] / done["window_s"]}


def streams_open(target: Target, scale: Scale) -> Values:
    """Memory while many slow streams are open."""
    spread_s, window_s = scale.open_streams / 500, 0.5
    events = math.ceil(spread_s + SETTLE_S + window_s + 2)
    window = CpuWindow(target.running)
    _load(
        target,
        window,
        body(events, 1_000_000),
        mode="stream",
        conns=scale.open_streams,
        spread_ms=int(spread_s * 1000),
        window_ms=int(window_s * 1000),
        events=events + EVENTS_BESIDE_CONTENT if target.exact else 0,
    )
    rss_mb, pss_mb = window.memory
    return {"rss_mb": rss_mb, "pss_mb": pss_mb}


def _latency(target: Target, scale: Scale, rate: int) -> Values:
    window = CpuWindow(target.running)
    done = _load(
        target,
        window,
        body(),
        mode="rate",
        rate=rate,
        conns=32,
        warm_ms=int(scale.warm_s * 1000),
        window_ms=int(scale.window_s * 1000),
        length=target.length,
    )
    if done["window_requests"] < CARRIED_MIN * rate * done["window_s"]:
        raise WrongAnswer(f"{target.running.name} carried {done['window_requests'] / done['window_s']:.0f} of {rate}/s")
    return {
        "p50_us": done["p50_us"],
        "p99_us": done["p99_us"],
        "max_us": done["max_us"],
        "cpu_us": window.used_s() * 1e6 / done["window_requests"],
    }


def latency_200(target: Target, scale: Scale) -> Values:
    """Latency at 200 requests a second."""
    return _latency(target, scale, 200)


def latency_1000(target: Target, scale: Scale) -> Values:
    """Latency at 1,000 requests a second."""
    return _latency(target, scale, 1000)


def idle(target: Target, _: Scale) -> Values:
    """CPU that the proxy and the processes beside it use without any request."""
    charged, beside = target.running.charged(), target.running.beside()
    began = time.monotonic()
    before, before_beside = cpu_time(charged), cpu_time(beside)
    time.sleep(IDLE_S)
    spent_s = time.monotonic() - began
    return {
        "core_percent": 100 * cpu_used_s(before, cpu_time(charged)) / spent_s,
        "beside_percent": 100 * cpu_used_s(before_beside, cpu_time(beside)) / spent_s if beside else 0.0,
    }


Measure = Callable[[Target, Scale], Values]
KINDS: dict[str, Measure] = {
    "idle": idle,
    "request": requests_busy,
    "event": streams_even,
    "burst": streams_in_step,
    "latency200": latency_200,
    "latency1000": latency_1000,
    "memory": streams_open,
    "tls": requests_tls,
}
DIRECT_KINDS = ("latency200", "latency1000")  # the measurements of the mock itself
SLOW_KINDS = (
    "idle",
    "request",
    "event",
    "burst",
)  # the measurements of a peer that carries under 200 requests a second


def applies(kind: str, running: Running, slow: bool) -> bool:
    """Whether a measurement makes sense for a proxy."""
    if not running.charged():
        return kind in DIRECT_KINDS
    if kind == "tls" and not running.tls_port:
        return False
    return not slow or kind in SLOW_KINDS
