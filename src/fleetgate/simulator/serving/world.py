"""The simulated world: one heap of events, engines and a network that take time, and a balancer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from fleetgate.core.model import Deployment
from fleetgate.simulator.serving.replica import ReplicaJob, SimulatedReplica

TICK_S = 1.0
TICKS_ALONE_MAX = 600  # ticks without any other event; after so many, none will come
PROGRESS_EVERY = 200  # requests


class UnfinishedRequest(Exception):
    """A balancer dropped requests: neither sent nor refused, and no event is left that could end them."""


@dataclass(slots=True, eq=False)
class Arrival:
    """One request of a trace and its result. `output_tokens` is the truth, which no balancer may read.

    Units: `first_s` and `ended_s` at the client, −1 if they did not happen.
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
    """A replica with its Deployment and its round trips. Units: `rtts_s` by proxy."""

    deployment: Deployment
    replica: SimulatedReplica
    rtts_s: Sequence[float]
    jobs: dict[int, tuple[ReplicaJob, Arrival]] = field(default_factory=dict)
    refuses: bool = False


class Balancer(Protocol):
    """Decides where a request goes. It calls `send`, `refuse` and `wake_at` of the world."""

    def on_arrival(self, arrival: Arrival, now_s: float) -> None:
        """A request reached its proxy."""

    def on_first_token(self, arrival: Arrival, now_s: float) -> None:
        """Its first token came back."""

    def on_finished(self, arrival: Arrival, now_s: float) -> None:
        """Its last token came back."""

    def on_failed(self, arrival: Arrival, failure: str, now_s: float) -> None:
        """The attempt failed: `full` if the engine refused it, `broken` if the engine died."""

    def on_tick(self, now_s: float) -> None:
        """A second has passed."""

    def on_wake(self, now_s: float) -> None:
        """The time of a `wake_at` has come."""

    def limit_of(self, slot: int) -> int:
        """The current limit of a Deployment, 0 for none."""


class World:
    """Engines, network and clock. Every arrival ends exactly once: finished or refused.

    Shape: an Endpoint's slot is the index of its engine; `proxy_regions` has one region for each proxy.
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
        """Send a request to an engine; it arrives there half a round trip later."""
        arrival.replica = engine
        slot = self.engines[engine].deployment.slot
        self.in_flight[slot] += 1
        limit = self.balancer.limit_of(slot)
        if limit:
            self.overcommit_max = max(self.overcommit_max, (self.in_flight[slot] - limit) / limit)
        self._later(now_s + self._half_s(arrival, engine), self._reach, arrival, engine)

    def refuse(self, arrival: Arrival, reason: str, now_s: float) -> None:
        """Refuse a request to its client."""
        arrival.refused = reason
        self._open -= 1

    def wake_at(self, at_s: float) -> None:
        """Schedule a call of the balancer's `on_wake`."""
        self._push(at_s, self._wake, ())

    def rtt_s(self, proxy: int, slot: int) -> float:
        """The round trip from a proxy to a Deployment."""
        return next(engine.rtts_s[proxy] for engine in self.engines if engine.deployment.slot == slot)

    def is_up(self, engine: int) -> bool:
        """The result of a health probe."""
        return self.engines[engine].replica.up

    def waiting(self, engine: int) -> int:
        """The engine's own metric: requests in its queue."""
        return len(self.engines[engine].replica.queue)

    def kv_share(self, engine: int) -> float:
        """The engine's own metric: the share of its KV cache in use."""
        return self.engines[engine].replica.kv_share

    def tokens_received(self, arrival: Arrival, now_s: float) -> int:
        """Tokens of a stream that its proxy has received; 0 once the engine has finished it."""
        engine = self.engines[arrival.replica]
        known = engine.jobs.get(arrival.index)
        if known is None or arrival.first_s < 0.0:
            return 0
        return engine.replica.tokens_of(known[0], now_s - self._half_s(arrival, arrival.replica))

    # --- running ---

    def at(self, at_s: float, callback: Callable[[float], None]) -> None:
        """Schedule a call, for example of a fault that begins or ends."""
        self._push(at_s, callback, None)

    def run(self, arrivals: Sequence[Arrival], progress: Callable[[int], None] = lambda done: None) -> None:
        """Run until every arrival has ended.

        Raises: `UnfinishedRequest`.
        """
        self._open = len(arrivals)
        for arrival in arrivals:
            self._push(arrival.at_s, self._arrive, (arrival,))
        self._push(TICK_S, self._tick, ())
        done, total = 0, len(arrivals)
        while self._heap and self._open:
            at_s, _, callback, arguments = heappop(self._heap)
            self.now_s = at_s
            if arguments is None:
                callback(at_s)
            else:
                callback(*arguments)
            if total - self._open >= done + PROGRESS_EVERY:
                done = total - self._open
                progress(done)
        progress(total)

    def slow_down(self, engine: int, slowness: float, now_s: float) -> None:
        """A fault: the engine slows down without an error, or recovers."""
        self._change(engine, lambda replica: replica.slow_down(slowness, now_s))

    def take_down(self, engine: int, now_s: float) -> None:
        """A fault: the engine dies and loses all its jobs."""
        simulated = self.engines[engine]
        simulated.replica.up = False
        lost = [simulated.jobs.pop(job.index)[1] for job in simulated.replica.die()]
        for arrival in lost:
            self._later(now_s + self._half_s(arrival, engine), self._fail, arrival, engine, "broken")

    def bring_up(self, engine: int) -> None:
        """End of the fault: the engine is up again, and empty."""
        self.engines[engine].replica.up = True

    # --- events ---

    def _push(self, at_s: float, callback: Callable[..., None], arguments: tuple[object, ...] | None) -> None:
        heappush(self._heap, (at_s, next(self._order), callback, arguments))

    def _later(self, at_s: float, callback: Callable[..., None], *arguments: object) -> None:
        if at_s <= self.now_s:
            callback(*arguments)
        else:
            self._push(at_s, callback, arguments)

    def _half_s(self, arrival: Arrival, engine: int) -> float:
        return 0.5 * self.engines[engine].rtts_s[arrival.proxy]

    def _arrive(self, arrival: Arrival) -> None:
        self.balancer.on_arrival(arrival, self.now_s)

    def _tick(self) -> None:
        self._ticks_alone = 0 if self._heap else self._ticks_alone + 1
        if self._ticks_alone > TICKS_ALONE_MAX:
            raise UnfinishedRequest(f"{self._open} requests were neither sent nor refused by {self.now_s:.0f} s")
        self._push(self.now_s + TICK_S, self._tick, ())
        self.balancer.on_tick(self.now_s)

    def _wake(self) -> None:
        self.balancer.on_wake(self.now_s)

    def _reach(self, arrival: Arrival, engine: int) -> None:
        simulated = self.engines[engine]
        if not simulated.replica.up or simulated.refuses:
            failure = "full" if simulated.replica.up else "broken"
            # Always through the heap, even without a round trip: the balancer is still inside `send`.
            self._push(self.now_s + self._half_s(arrival, engine), self._fail, (arrival, engine, failure))
            return
        job = ReplicaJob(arrival.index, arrival.prompt_tokens, arrival.output_tokens, arrival.blocks)
        simulated.jobs[arrival.index] = (job, arrival)
        self._change(engine, lambda replica: replica.push(job, self.now_s))

    def _change(self, engine: int, change: Callable[[SimulatedReplica], None]) -> None:
        """Change a replica, and schedule the end of its leap if that moved."""
        replica = self.engines[engine].replica
        version = replica.version
        change(replica)
        if replica.version != version and not replica.idle:
            self._push(replica.ends_s, self._advance, (engine, replica.version))

    def _advance(self, engine: int, version: int) -> None:
        simulated = self.engines[engine]
        replica = simulated.replica
        if replica.version != version:
            return  # the leap was shortened, and its new end is scheduled
        firsts, ended = replica.advance()
        if not replica.idle:
            self._push(replica.ends_s, self._advance, (engine, replica.version))
        for job in firsts:
            arrival = simulated.jobs[job.index][1]
            self._later(self.now_s + self._half_s(arrival, engine), self._first_token, arrival)
        for job in ended:
            _, arrival = simulated.jobs.pop(job.index)
            self._later(self.now_s + self._half_s(arrival, engine), self._finish, arrival, engine)

    def _first_token(self, arrival: Arrival) -> None:
        arrival.first_s = self.now_s
        self.balancer.on_first_token(arrival, self.now_s)

    def _finish(self, arrival: Arrival, engine: int) -> None:
        arrival.ended_s = self.now_s
        self._open -= 1
        self.in_flight[self.engines[engine].deployment.slot] -= 1
        self.balancer.on_finished(arrival, self.now_s)

    def _fail(self, arrival: Arrival, engine: int, failure: str) -> None:
        self.in_flight[self.engines[engine].deployment.slot] -= 1
        self.balancer.on_failed(arrival, failure, self.now_s)
