"""The figures of a run: medians, ranges, ratios, and which targets they meet."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.measure import Values

REFERENCE = "haproxy"
SUBJECT = "fleetgate"
DIRECT = "direct"
FLOOR = "uvloop-bytes"


@dataclass
class Results:
    """All values of a run. Shape: `values[peer][kind]` has one entry a round, None where it failed."""

    facts: dict[str, str]
    versions: dict[str, str]
    abouts: dict[str, str]
    absent: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    values: dict[str, dict[str, list[Values | None]]] = field(default_factory=dict)

    def add(self, peer: str, kind: str, values: Values | None) -> None:
        """Note one measurement."""
        self.values.setdefault(peer, {}).setdefault(kind, []).append(values)

    def series(self, peer: str, kind: str, name: str) -> list[float]:
        """One figure's rounds, without failed ones."""
        return [entry[name] for entry in self.values.get(peer, {}).get(kind, []) if entry is not None]

    def paired(self, pick: "Cell", other: "Cell", join: Callable[[float, float], float]) -> list[float]:
        """Two figures joined round by round, which cancels the drift of the machine."""
        rounds = zip(self._rounds(pick), self._rounds(other), strict=False)
        return [join(a, b) for a, b in rounds if a is not None and b is not None and b > 0]

    def _rounds(self, cell: "Cell") -> list[float | None]:
        entries = self.values.get(cell[0], {}).get(cell[1], [])
        return [None if entry is None else entry[cell[2]] for entry in entries]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps(self.__dict__, indent=1))


Cell = tuple[str, str, str]  # peer, kind, name of the value


def _ratio(a: float, b: float) -> float:
    return a / b


def _minus(a: float, b: float) -> float:
    return a - b


def spread(values: list[float], digits: int) -> str:
    """Median and range, `–` if nothing was measured."""
    if not values:
        return "–"
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def _ratios(results: Results, peer: str, kind: str, name: str) -> str:
    found = results.paired((peer, kind, name), (REFERENCE, kind, name), _ratio)
    return f"{median(found):.2f}" if found else "–"


def _added(results: Results, peer: str, kind: str) -> str:
    if peer == DIRECT:
        return f"[{_middle(results, peer, kind, 'p50_us')}/{_middle(results, peer, kind, 'p99_us')}]"
    both = [results.paired((peer, kind, p), (DIRECT, kind, p), _minus) for p in ("p50_us", "p99_us")]
    return "/".join(f"{median(values):.0f}" for values in both) if all(both) else "–"


def _middle(results: Results, peer: str, kind: str, name: str) -> str:
    found = results.series(peer, kind, name)
    return f"{median(found):.0f}" if found else "–"


COLUMNS = [
    "",
    "CPU µs/request",
    "× HAProxy",
    "requests/s",
    "CPU µs/event",
    "× HAProxy",
    "CPU µs/event in bursts",
    "× HAProxy",
    "added p50/p99 µs at 200/s",
    "at 1,000/s",
    "PSS MB, open streams",
    "CPU µs/request over TLS",
    "× HAProxy",
    "idle, % of a core",
]


def rows(results: Results) -> list[list[str]]:
    """One row a peer, in the order they were measured."""
    made = []
    for peer in results.values:
        if peer.startswith(f"{SUBJECT}-"):
            continue
        idle, beside = (spread(results.series(peer, "idle", name), 1) for name in ("core_percent", "beside_percent"))
        made.append(
            [
                peer,
                spread(results.series(peer, "request", "cpu_us"), 1),
                _ratios(results, peer, "request", "cpu_us"),
                _middle(results, peer, "request", "per_s"),
                spread(results.series(peer, "event", "cpu_us"), 1),
                _ratios(results, peer, "event", "cpu_us"),
                spread(results.series(peer, "burst", "cpu_us"), 1),
                _ratios(results, peer, "burst", "cpu_us"),
                _added(results, peer, "latency200"),
                _added(results, peer, "latency1000"),
                spread(results.series(peer, "memory", "pss_mb"), 1),
                spread(results.series(peer, "tls", "cpu_us"), 1),
                _ratios(results, peer, "tls", "cpu_us"),
                f"{idle} + {beside} beside" if peer == SUBJECT and idle != "–" else idle,
            ]
        )
    return made


def workers_sentence(results: Results) -> str:
    """The gain of a second worker in one sentence, empty if it was not measured."""
    names = (f"{SUBJECT}-1", f"{SUBJECT}-2")
    cpu = [results.series(name, "workers", "cpu_us") for name in names]
    per_s = [results.series(name, "workers", "per_s") for name in names]
    if not all(cpu) or not all(per_s):
        return ""
    measured = median(results.paired((names[1], "workers", "per_s"), (names[0], "workers", "per_s"), _ratio))
    dearer = median(results.paired((names[1], "workers", "cpu_us"), (names[0], "workers", "cpu_us"), _ratio))
    return (
        f"Two workers carried {median(per_s[1]):,.0f} requests/s against one's {median(per_s[0]):,.0f} "
        f"({measured:.2f} ×) on {results.facts['cores']} cores that mock and client share; "
        f"a request cost {median(cpu[1]):.1f} µs against {median(cpu[0]):.1f}, "
        f"so with a core for each they would carry {2 / dearer:.2f} × one."
    )


def floor_sentence(results: Results) -> str:
    """The event loop's cost beside the reference, and Fleetgate's beside the loop's; empty if not measured."""
    parts = []
    for kind, what in (("request", "a request"), ("event", "an event"), ("burst", "an event in bursts")):
        floor = results.paired((FLOOR, kind, "cpu_us"), (REFERENCE, kind, "cpu_us"), _ratio)
        above = results.paired((SUBJECT, kind, "cpu_us"), (FLOOR, kind, "cpu_us"), _ratio)
        if floor and above:
            parts.append(f"{what}: {median(floor):.2f} × HAProxy, Fleetgate {median(above):.2f} × that")
    return f"What moving bytes on the same event loop costs ({FLOOR}), {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured against it."""

    what: str
    measured: float | None
    limit: float
    at_least: bool = False

    def sentence(self) -> str:
        """Target, figure, met or missed."""
        sign = "≥" if self.at_least else "≤"
        if self.measured is None:
            return f"{self.what} {sign} {self.limit:g}: not measured"
        met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        return f"{self.what} {sign} {self.limit:g}: {self.measured:.2f}, {'met' if met else 'MISSED'}"


def verdicts(results: Results) -> list[Verdict]:
    """The targets of this benchmark and their results."""

    def ratio(kind: str, name: str, to: str) -> float | None:
        found = results.paired((SUBJECT, kind, name), (to, kind, name), _ratio)
        return median(found) if found else None

    def added_ms(name: str) -> float | None:
        found = results.paired((SUBJECT, "latency200", name), (DIRECT, "latency200", name), _minus)
        return median(found) / 1000 if found else None

    memory = results.series(SUBJECT, "memory", "pss_mb")
    dearer = results.paired((f"{SUBJECT}-2", "workers", "cpu_us"), (f"{SUBJECT}-1", "workers", "cpu_us"), _ratio)
    return [
        Verdict("CPU per request ÷ HAProxy's", ratio("request", "cpu_us", REFERENCE), 2.0),
        Verdict("CPU per request ÷ Envoy's (plain route)", ratio("request", "cpu_us", "envoy"), 0.6),
        Verdict("CPU per request ÷ Envoy's (route by model)", ratio("request", "cpu_us", "envoy-model"), 0.6),
        Verdict("CPU per streamed event ÷ HAProxy's", ratio("event", "cpu_us", REFERENCE), 1.4),
        Verdict("CPU per streamed event in bursts ÷ HAProxy's", ratio("burst", "cpu_us", REFERENCE), 1.4),
        Verdict("added p50 at 200 requests/s, ms", added_ms("p50_us"), 0.5),
        Verdict("added p99 at 200 requests/s, ms", added_ms("p99_us"), 2.0),
        Verdict("MB of a worker with the open streams", median(memory) if memory else None, 64.0),
        Verdict("two workers ÷ one, by CPU per request", 2 / median(dearer) if dearer else None, 1.8, at_least=True),
    ]


def show(results: Results, console: Console) -> None:
    """Print the table, the targets and the failures."""
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    for verdict in verdicts(results):
        console.print(f"  {verdict.sentence()}")
    for line in filter(None, [workers_sentence(results), floor_sentence(results), *_notes(results)]):
        console.print(line, markup=False)


def _notes(results: Results) -> list[str]:
    return [f"{peer} is absent: {why}" for peer, why in results.absent.items()] + results.failed


def markdown(results: Results, command: str) -> str:
    """The page `bench/RESULTS.md`."""
    facts = results.facts
    lines = [
        "# Benchmark results",
        "",
        f"`{command}` on {facts['date']}: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, "
        f"{facts['kernel']}, Python {facts['python']}; load average at the start {facts['loadavg']}.",
        "",
        "Proxy on the first core, mock upstream and load client on the second. Medians of "
        f"{facts['rounds']} interleaved rounds, range in brackets; ratios and added latencies are taken by round. "
        "CPU is user and system time of the proxy's processes as the kernel counts it. Every answer was checked.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        f"Load: {facts['load']}. In the row of `direct` (client to mock, no proxy) the latencies are total ones.",
        "",
        *(line for text in (workers_sentence(results), floor_sentence(results)) if text for line in (text, "")),
        "## Targets",
        "",
        *(f"- {verdict.sentence()}" for verdict in verdicts(results)),
        "",
        "## What was compared",
        "",
        *(f"- {peer} {results.versions[peer]}: {about}" for peer, about in results.abouts.items()),
        *(f"- {note}" for note in _notes(results)),
        "",
    ]
    return "\n".join(lines)
