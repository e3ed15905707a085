"""The simulated engine: leaps over many steps have exactly the result of taking every step."""

from collections import deque
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.model import Profile
from fleetgate.simulator.serving.replica import BLOCK_TOKENS, ReplicaJob, SimulatedReplica


class EngineEvent(NamedTuple):
    """A request that arrives, or, with `slowness`, a change of the engine's speed."""

    at_s: float
    prompt_tokens: int = 1
    output_tokens: int = 1
    slowness: float = 0.0
    blocks: tuple[int, ...] = ()


# All speeds and times are multiples of powers of two, so that sums and products of floats are exact and ties are real.
profiles = st.builds(
    Profile,
    name=st.just("p"),
    prefill_tokens_per_s=st.sampled_from([1024.0, 4096.0, 16384.0]),
    base_s=st.integers(1, 16).map(lambda n: n / 256),
    per_sequence_s=st.integers(0, 16).map(lambda n: n / 4096),
    batch_max=st.integers(1, 6),
    kv_tokens=st.sampled_from([0, 3000, 8000, 100_000]),
)
moments = st.integers(0, 400).map(lambda n: n / 64)
sizes = st.tuples(
    st.one_of(st.integers(1, 300), st.integers(1, 7000)),
    st.one_of(st.just(1), st.integers(1, 40)),
)
requests = st.tuples(moments, sizes).map(lambda drawn: EngineEvent(drawn[0], *drawn[1]))
changes = st.tuples(moments, st.sampled_from([0.5, 1.0, 2.0, 4.0])).map(
    lambda drawn: EngineEvent(drawn[0], slowness=drawn[1])
)
workloads = st.tuples(st.lists(requests, min_size=1, max_size=14), st.lists(changes, max_size=2)).map(
    lambda parts: sorted([*parts[0], *parts[1]], key=lambda event: event.at_s)
)

Times = dict[int, list[float]]  # when each request got each of its tokens


def step_by_step(profile: Profile, events: list[EngineEvent]) -> Times:
    """The definition of the engine: one step after the other."""
    pending, queue = deque(enumerate(events)), deque[int]()
    left = {n: event.prompt_tokens for n, event in enumerate(events)}
    prefilling: list[int] = []
    decoding: list[int] = []
    times: Times = {}
    now_s, slowness = 0.0, 1.0

    def kv_of(requests: list[int]) -> int:
        return sum(events[n].prompt_tokens + events[n].output_tokens for n in requests)

    while True:
        idle = not (queue or prefilling or decoding)
        while pending and (pending[0][1].at_s < now_s or idle):
            n, event = pending.popleft()
            now_s = max(now_s, event.at_s)
            if event.slowness:
                slowness = event.slowness
            else:
                queue.append(n)
                idle = False
        if not (queue or prefilling or decoding):
            return times
        while queue and len(prefilling) + len(decoding) < profile.batch_max:
            reserved = kv_of(prefilling + decoding)
            if reserved and profile.kv_tokens and reserved + kv_of([queue[0]]) > profile.kv_tokens:
                break
            prefilling.append(queue.popleft())
        chunk = min(CHUNK_TOKENS, sum(left[n] for n in prefilling))
        decode_s = profile.base_s + profile.per_sequence_s * len(decoding) if decoding else 0.0
        now_s += (decode_s + chunk / profile.prefill_tokens_per_s) * slowness
        for n in decoding:
            times[n].append(now_s)
        for n in prefilling:
            done = min(chunk, left[n])
            left[n] -= done
            chunk -= done
        for n in [n for n in prefilling if not left[n]]:
            prefilling.remove(n)
            decoding.append(n)
            times[n] = [now_s]
        decoding = [n for n in decoding if len(times[n]) < events[n].output_tokens]


class Driver:
    """Drives a replica as the world does, with the end of its leap in a heap."""

    def __init__(self, profile: Profile) -> None:
        self.replica = SimulatedReplica(profile)
        self.heap: list[tuple[float, int]] = []
        self.first_s: dict[int, float] = {}
        self.ended_s: dict[int, float] = {}

    def until(self, now_s: float) -> None:
        """Advance over all ends of leaps up to a time."""
        while self.heap and self.heap[0][0] <= now_s:
            at_s, version = heappop(self.heap)
            if version != self.replica.version:
                continue
            firsts, ended = self.replica.advance()
            self.first_s |= {job.index: at_s for job in firsts}
            self.ended_s |= {job.index: at_s for job in ended}
            if not self.replica.idle:
                heappush(self.heap, (self.replica.ends_s, self.replica.version))
            self.check()

    def apply(self, n: int, event: EngineEvent) -> ReplicaJob | None:
        """Apply one event, after the ends of leaps before it."""
        self.until(event.at_s)
        version, job = self.replica.version, None
        if event.slowness:
            self.replica.slow_down(event.slowness, event.at_s)
        else:
            job = ReplicaJob(n, event.prompt_tokens, event.output_tokens, event.blocks)
            self.replica.push(job, event.at_s)
        if self.replica.version != version and not self.replica.idle:
            heappush(self.heap, (self.replica.ends_s, self.replica.version))
        self.check()
        return job

    def check(self) -> None:
        """Check the invariants between two steps."""
        replica = self.replica
        running = [*replica.prefilling, *(job for _, _, job in replica.decoding)]
        assert len(running) <= replica.profile.batch_max
        assert replica.kv_used == sum(job.kv_tokens for job in running)
        if replica.profile.kv_tokens and len(running) > 1:
            assert replica.kv_used <= replica.profile.kv_tokens


@given(profiles, workloads)
def test_leaps_equal_single_steps(profile: Profile, events: list[EngineEvent]) -> None:
    driver = Driver(profile)
    for n, event in enumerate(events):
        driver.apply(n, event)
    driver.until(float("inf"))
    times = step_by_step(profile, events)
    assert driver.first_s == {n: tokens[0] for n, tokens in times.items()}
    assert driver.ended_s == {n: tokens[-1] for n, tokens in times.items()}


@given(profiles, workloads, st.lists(st.integers(0, 2000).map(lambda n: n / 128), min_size=1, max_size=20))
def test_tokens_in_the_middle_of_a_leap_are_those_of_its_steps(
    profile: Profile, events: list[EngineEvent], times_s: list[float]
) -> None:
    driver, jobs = Driver(profile), dict[int, ReplicaJob]()
    times = step_by_step(profile, events)
    timeline = sorted([*((event.at_s, n) for n, event in enumerate(events)), *((at_s, -1) for at_s in times_s)])
    for at_s, n in timeline:
        driver.until(at_s)
        if n >= 0:
            if (job := driver.apply(n, events[n])) is not None:
                jobs[n] = job
            continue
        for known, job in jobs.items():
            if known in driver.ended_s:
                continue
            assert driver.replica.tokens_of(job, at_s) == sum(token_s <= at_s for token_s in times[known])


@given(profiles, workloads)
def test_prompts_are_computed_first_come_first_served(profile: Profile, events: list[EngineEvent]) -> None:
    driver = Driver(profile)
    for n, event in enumerate(events):
        driver.apply(n, event)
    driver.until(float("inf"))
    firsts = [driver.first_s[n] for n in sorted(driver.first_s)]
    assert all(before <= after for before, after in pairwise(firsts))


blocks = st.lists(st.integers(0, 5), max_size=6).map(tuple)


@given(st.lists(st.tuples(blocks, st.integers(1, BLOCK_TOKENS)), min_size=1, max_size=12), st.sampled_from([0, 4000]))
def test_a_cached_prefix_saves_time_and_never_the_last_block(
    prompts: list[tuple[tuple[int, ...], int]], kv_tokens: int
) -> None:
    """Prompts one after the other, so that TTFT shows how many tokens were computed."""
    profile = Profile(name="p", prefill_tokens_per_s=1024.0, base_s=0.25, per_sequence_s=0.0, kv_tokens=kv_tokens)
    driver, seen = Driver(profile), set[int]()
    for n, (prefix, last) in enumerate(prompts):
        tokens = BLOCK_TOKENS * max(0, len(prefix) - 1) + last
        at_s = n * 1000.0
        driver.apply(n, EngineEvent(at_s, tokens, 2, blocks=prefix))
        driver.until(at_s + 999.0)
        computed = (driver.first_s[n] - at_s) * 1024.0
        hit = 0
        for block in prefix[:-1]:
            if block not in seen:
                break
            hit += 1
        assert last <= computed <= tokens
        if not kv_tokens:  # the cache holds every block, so exactly those seen before are hits
            assert computed == tokens - hit * BLOCK_TOKENS
        seen |= set(prefix)


@given(profiles, workloads)
def test_a_replica_that_dies_returns_all_jobs_and_keeps_none(profile: Profile, events: list[EngineEvent]) -> None:
    driver = Driver(profile)
    for n, event in enumerate(events):
        driver.apply(n, event)
    lost = {job.index for job in driver.replica.die()}
    all_requests = {n for n, event in enumerate(events) if not event.slowness}
    assert lost == all_requests - set(driver.ended_s)
    assert driver.replica.idle and driver.replica.in_flight == 0 and driver.replica.kv_used == 0
