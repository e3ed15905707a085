"""The simulated world: one heap of events, engines that take time, a network that takes time, and a balancer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from fleetgate.core.model import Deployment
from fleetgate.simulator.replica import ReplicaJob, SimulatedReplica

TICK_S = 1.0
TICKS_ALONE_MAX = 600  # with nothing else to come: then nothing ever will


class UnfinishedRequest(Exception):
    """A balancer let go of requests: neither sent nor refused, and nothing is left that could end them."""


@dataclass(slots=True, eq=False)
class Arrival:
    """One request of a trace, and what became of it. `output_tokens` is the truth, which no balancer may look at.

    Units: `first_s` and `ended_s` at the client, −1 where they never came.
    """

    index: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    region: str = ""
    key: str = ""
    proxy: int = 0
    first_s: float = -1.0
    ended_s: float = -1.0
    replica: int = -1
    refused: str = ""


@dataclass(slots=True)
class SimulatedEngine:
    """A replica with its place in the fleet."""

    deployment: Deployment
    replica: SimulatedReplica
    rtts_s: Sequence[float]  # by proxy
    jobs: dict[int, tuple[ReplicaJob, Arrival]] = field(default_factory=dict)
    refuses: bool = False


class Balancer(Protocol):
    """What decides where a request goes. It calls `send`, `refuse` and `wake_at` of the world."""

    def arrive(self, arrival: Arrival, now_s: float) -> None:
        """A request came to its proxy."""

    def first_token(self, arrival: Arrival, now_s: float) -> None:
        """Its first token came back."""

    def finished(self, arrival: Arrival, now_s: float) -> None:
        """Its last token came back."""

    def failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """The attempt was lost: `full` for a refusal, `broken` for an engine that died."""

    def tick(self, now_s: float) -> None:
        """A second has passed."""

    def woken(self, now_s: float) -> None:
        """The moment of a `wake_at`."""

    def limit_of(self, slot: int) -> int:
        """The limit of a Deployment now, 0 for none."""


class World:
    """Engines, network and clock. Every arrival ends exactly once: finished, refused, or lost.

    Shape: `engines` are individually addressable; an Endpoint's slot is its index. `proxies` is how many there are.
    """

    def __init__(self, engines: Sequence[SimulatedEngine], proxy_regions: Sequence[str]) -> None:
        self.engines = engines
        self.proxy_regions = proxy_regions
        self.balancer: Balancer
        self.now_s = 0.0
        self.in_flight: dict[int, int] = {engine.deployment.slot: 0 for engine in engines}
        self.overcommit_max = 0.0
        self._open = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...] | None]] = []
        self._order = count()
        self._ticks_alone = 0

    # --- for balancers ---

    def send(self, arrival: Arrival, engine: int, now_s: float) -> None:
        """Send a request to an engine; it gets there half a round trip later."""
        arrival.replica = engine
        slot = self.engines[engine].deployment.slot
        self.in_flight[slot] += 1
        limit = self.balancer.limit_of(slot)
        if limit:
            self.overcommit_max = max(self.overcommit_max, (self.in_flight[slot] - limit) / limit)
        self._later(now_s + self._half_s(arrival, engine), self._reach, arrival, engine)

    def refuse(self, arrival: Arrival, reason: str, now_s: float) -> None:
        """Tell the client that it will not be served."""
        arrival.refused = reason
        self._open -= 1

    def wake_at(self, at_s: float) -> None:
        """Ask to be woken."""
        self._push(at_s, self._wake, ())

    def rtt_s(self, proxy: int, slot: int) -> float:
        """The round trip from a proxy to a Deployment."""
        return next(engine.rtts_s[proxy] for engine in self.engines if engine.deployment.slot == slot)

    def is_up(self, engine: int) -> bool:
        """What a probe would say."""
        return self.engines[engine].replica.up

    def waiting(self, engine: int) -> int:
        """The engine's own metric: requests that wait in it."""
        return len(self.engines[engine].replica.queue)

    def kv_share(self, engine: int) -> float:
        """The engine's own metric: how much of its KV cache is in use."""
        return self.engines[engine].replica.kv_share

    def tokens_received(self, arrival: Arrival, now_s: float) -> int:
        """Tokens that a stream has brought to its proxy so far; 0 once the engine is done with it."""
        engine = self.engines[arrival.replica]
        known = engine.jobs.get(arrival.index)
        if known is None or arrival.first_s < 0.0:
            return 0
        return engine.replica.tokens_of(known[0], now_s - self._half_s(arrival, arrival.replica))

    # --- running ---

    def at(self, at_s: float, happen: Callable[[float], None]) -> None:
        """Let something happen at a time: a fault begins or ends."""
        self._push(at_s, happen, None)

    def run(self, arrivals: Sequence[Arrival], progress: Callable[[int], None] = lambda done: None) -> None:
        """Until every arrival has ended.

        Raises: `UnfinishedRequest`.
        """
        self._open = len(arrivals)
        for arrival in arrivals:
            self._push(arrival.at_s, self._arrive, (arrival,))
        self._push(TICK_S, self._tick, ())
        done, total = 0, len(arrivals)
        while self._heap and self._open:
            at_s, _, happen, what = heappop(self._heap)
            self.now_s = at_s
            if what is None:
                happen(at_s)
            else:
                happen(*what)
            if total - self._open >= done + 200:
                done = total - self._open
                progress(done)
        progress(total)

    def slow_down(self, engine: int, slowness: float, now_s: float) -> None:
        """A fault: the engine silently slows down, or recovers."""
        self._poke(engine, lambda replica: replica.slow_down(slowness, now_s))

    def take_down(self, engine: int, now_s: float) -> None:
        """A fault: the engine dies with everything in it."""
        truth = self.engines[engine]
        truth.replica.up = False
        lost = [truth.jobs.pop(job.identity)[1] for job in truth.replica.die()]
        for arrival in lost:
            self._later(now_s + self._half_s(arrival, engine), self._fail, arrival, engine, "broken")

    def bring_up(self, engine: int) -> None:
        """It is back, empty."""
        self.engines[engine].replica.up = True

    # --- events ---

    def _push(self, at_s: float, happen: Callable[..., None], what: tuple[object, ...] | None) -> None:
        heappush(self._heap, (at_s, next(self._order), happen, what))

    def _later(self, at_s: float, happen: Callable[..., None], *what: object) -> None:
        if at_s <= self.now_s:
            happen(*what)
        else:
            self._push(at_s, happen, what)

    def _half_s(self, arrival: Arrival, engine: int) -> float:
        return 0.5 * self.engines[engine].rtts_s[arrival.proxy]

    def _arrive(self, arrival: Arrival) -> None:
        self.balancer.arrive(arrival, self.now_s)

    def _tick(self) -> None:
        self._ticks_alone = 0 if self._heap else self._ticks_alone + 1
        if self._ticks_alone > TICKS_ALONE_MAX:
            raise UnfinishedRequest(f"{self._open} requests were neither sent nor refused by {self.now_s:.0f} s")
        self._push(self.now_s + TICK_S, self._tick, ())
        self.balancer.tick(self.now_s)

    def _wake(self) -> None:
        self.balancer.woken(self.now_s)

    def _reach(self, arrival: Arrival, engine: int) -> None:
        truth = self.engines[engine]
        if not truth.replica.up or truth.refuses:
            failure = "full" if truth.replica.up else "broken"
            # Through the heap even without a round trip: the balancer is in the middle of sending.
            self._push(self.now_s + self._half_s(arrival, engine), self._fail, (arrival, engine, failure))
            return
        job = ReplicaJob(arrival.index, arrival.prompt_tokens, arrival.output_tokens, arrival.blocks)
        truth.jobs[arrival.index] = (job, arrival)
        self._poke(engine, lambda replica: replica.push(job, self.now_s))

    def _poke(self, engine: int, change: Callable[[SimulatedReplica], None]) -> None:
        replica = self.engines[engine].replica
        version = replica.version
        change(replica)
        if replica.version != version and not replica.idle:
            self._push(replica.ends_s, self._advance, (engine, replica.version))

    def _advance(self, engine: int, version: int) -> None:
        truth = self.engines[engine]
        replica = truth.replica
        if replica.version != version:
            return  # that leap was cut short
        firsts, ended = replica.advance()
        if not replica.idle:
            self._push(replica.ends_s, self._advance, (engine, replica.version))
        for job in firsts:
            arrival = truth.jobs[job.identity][1]
            self._later(self.now_s + self._half_s(arrival, engine), self._first, arrival)
        for job in ended:
            _, arrival = truth.jobs.pop(job.identity)
            self._later(self.now_s + self._half_s(arrival, engine), self._finish, arrival, engine)

    def _first(self, arrival: Arrival) -> None:
        arrival.first_s = self.now_s
        self.balancer.first_token(arrival, self.now_s)

    def _finish(self, arrival: Arrival, engine: int) -> None:
        arrival.ended_s = self.now_s
        self._open -= 1
        self.in_flight[self.engines[engine].deployment.slot] -= 1
        self.balancer.finished(arrival, self.now_s)

    def _fail(self, arrival: Arrival, engine: int, failure: str) -> None:
        self.in_flight[self.engines[engine].deployment.slot] -= 1
        self.balancer.failed(arrival, failure, self.now_s)
