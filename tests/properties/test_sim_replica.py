"""The simulated engine: it leaps over steps, and must come out exactly as if it took every one of them."""

from collections import deque
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.model import Profile
from fleetgate.simulator.replica import BLOCK_TOKENS, ReplicaJob, SimulatedReplica


class Ask(NamedTuple):
    """A request that comes, or, with `slowness`, an engine that changes its speed."""

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
asks = st.tuples(moments, sizes).map(lambda drawn: Ask(drawn[0], *drawn[1]))
changes = st.tuples(moments, st.sampled_from([0.5, 1.0, 2.0, 4.0])).map(lambda drawn: Ask(drawn[0], slowness=drawn[1]))
workloads = st.tuples(st.lists(asks, min_size=1, max_size=14), st.lists(changes, max_size=2)).map(
    lambda parts: sorted([*parts[0], *parts[1]], key=lambda ask: ask.at_s)
)

Times = dict[int, list[float]]  # when each request got each of its tokens


def step_by_step(profile: Profile, events: list[Ask]) -> Times:
    """The engine's definition, written down as plainly as it can be: one step after the other."""
    coming, queue = deque(enumerate(events)), deque[int]()
    left = {n: ask.prompt_tokens for n, ask in enumerate(events)}
    prefilling: list[int] = []
    decoding: list[int] = []
    times: Times = {}
    now_s, slowness = 0.0, 1.0

    def kv_of(requests: list[int]) -> int:
        return sum(events[n].prompt_tokens + events[n].output_tokens for n in requests)

    while True:
        idle = not (queue or prefilling or decoding)
        while coming and (coming[0][1].at_s < now_s or idle):
            n, ask = coming.popleft()
            now_s = max(now_s, ask.at_s)
            if ask.slowness:
                slowness = ask.slowness
            else:
                queue.append(n)
                idle = False
        if not (queue or prefilling or decoding):
            return times
        while queue and len(prefilling) + len(decoding) < profile.batch_max:
            held = kv_of(prefilling + decoding)
            if held and profile.kv_tokens and held + kv_of([queue[0]]) > profile.kv_tokens:
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


class Driven:
    """A replica with its announced moment in a heap, as the world drives it."""

    def __init__(self, profile: Profile) -> None:
        self.replica = SimulatedReplica(profile)
        self.heap: list[tuple[float, int]] = []
        self.first_s: dict[int, float] = {}
        self.ended_s: dict[int, float] = {}

    def until(self, now_s: float) -> None:
        """All boundaries up to a moment."""
        while self.heap and self.heap[0][0] <= now_s:
            at_s, version = heappop(self.heap)
            if version != self.replica.version:
                continue
            firsts, ended = self.replica.advance()
            self.first_s |= {job.identity: at_s for job in firsts}
            self.ended_s |= {job.identity: at_s for job in ended}
            if not self.replica.idle:
                heappush(self.heap, (self.replica.ends_s, self.replica.version))
            self.check()

    def happen(self, n: int, ask: Ask) -> ReplicaJob | None:
        """One event, after the boundaries before it."""
        self.until(ask.at_s)
        version, job = self.replica.version, None
        if ask.slowness:
            self.replica.slow_down(ask.slowness, ask.at_s)
        else:
            job = ReplicaJob(n, ask.prompt_tokens, ask.output_tokens, ask.blocks)
            self.replica.push(job, ask.at_s)
        if self.replica.version != version and not self.replica.idle:
            heappush(self.heap, (self.replica.ends_s, self.replica.version))
        self.check()
        return job

    def check(self) -> None:
        """What must hold between any two steps."""
        replica = self.replica
        running = [*replica.prefilling, *(job for _, _, job in replica.decoding)]
        assert len(running) <= replica.profile.batch_max
        assert replica.kv_used == sum(job.kv_tokens for job in running)
        if replica.profile.kv_tokens and len(running) > 1:
            assert replica.kv_used <= replica.profile.kv_tokens


@given(profiles, workloads)
def test_leaping_comes_out_exactly_like_taking_every_step(profile: Profile, events: list[Ask]) -> None:
    driven = Driven(profile)
    for n, ask in enumerate(events):
        driven.happen(n, ask)
    driven.until(float("inf"))
    times = step_by_step(profile, events)
    assert driven.first_s == {n: tokens[0] for n, tokens in times.items()}
    assert driven.ended_s == {n: tokens[-1] for n, tokens in times.items()}


@given(profiles, workloads, st.lists(st.integers(0, 2000).map(lambda n: n / 128), min_size=1, max_size=20))
def test_tokens_in_the_middle_of_a_leap_are_those_of_its_steps(
    profile: Profile, events: list[Ask], looks: list[float]
) -> None:
    driven, jobs = Driven(profile), dict[int, ReplicaJob]()
    times = step_by_step(profile, events)
    story = sorted([*((ask.at_s, n) for n, ask in enumerate(events)), *((at_s, -1) for at_s in looks)])
    for at_s, n in story:
        driven.until(at_s)
        if n >= 0:
            if (job := driven.happen(n, events[n])) is not None:
                jobs[n] = job
            continue
        for known, job in jobs.items():
            if known in driven.ended_s:
                continue
            assert driven.replica.tokens_of(job, at_s) == sum(token_s <= at_s for token_s in times[known])


@given(profiles, workloads)
def test_prompts_are_computed_first_come_first_served(profile: Profile, events: list[Ask]) -> None:
    driven = Driven(profile)
    for n, ask in enumerate(events):
        driven.happen(n, ask)
    driven.until(float("inf"))
    firsts = [driven.first_s[n] for n in sorted(driven.first_s)]
    assert all(before <= after for before, after in pairwise(firsts))


blocks = st.lists(st.integers(0, 5), max_size=6).map(tuple)


@given(st.lists(st.tuples(blocks, st.integers(1, BLOCK_TOKENS)), min_size=1, max_size=12), st.sampled_from([0, 4000]))
def test_a_cached_prefix_saves_time_and_never_the_last_block(
    prompts: list[tuple[tuple[int, ...], int]], kv_tokens: int
) -> None:
    """One after the other, so that the time to the first token shows how much was computed."""
    profile = Profile(name="p", prefill_tokens_per_s=1024.0, base_s=0.25, per_sequence_s=0.0, kv_tokens=kv_tokens)
    driven, seen = Driven(profile), set[int]()
    for n, (prefix, last) in enumerate(prompts):
        tokens = BLOCK_TOKENS * max(0, len(prefix) - 1) + last
        at_s = n * 1000.0
        driven.happen(n, Ask(at_s, tokens, 2, blocks=prefix))
        driven.until(at_s + 999.0)
        computed = (driven.first_s[n] - at_s) * 1024.0
        hit = 0
        for block in prefix[:-1]:
            if block not in seen:
                break
            hit += 1
        assert last <= computed <= tokens
        if not kv_tokens:  # room for every block there is, so that exactly those that were seen are still there
            assert computed == tokens - hit * BLOCK_TOKENS
        seen |= set(prefix)


@given(profiles, workloads)
def test_a_replica_that_dies_gives_everything_back_and_forgets_it(profile: Profile, events: list[Ask]) -> None:
    driven = Driven(profile)
    for n, ask in enumerate(events):
        driven.happen(n, ask)
    lost = {job.identity for job in driven.replica.die()}
    everyone = {n for n, ask in enumerate(events) if not ask.slowness}
    assert lost == everyone - set(driven.ended_s)
    assert driven.replica.idle and driven.replica.in_flight == 0 and driven.replica.kv_used == 0
