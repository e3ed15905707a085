"""One simulated engine: chunked prefill in the same steps as decoding, first come first served, KV cache reserved.

A step takes `(base_s + per_sequence_s × b if b else 0) + c / prefill_tokens_per_s` with b sequences decoding and
c ≤ 2048 prompt tokens of the oldest prompts. While nothing changes, many steps are computed at once, as one leap.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import floor
from typing import NamedTuple

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.model import Profile

BLOCK_TOKENS = 512
BLOCKS_WITHOUT_KV = 200_000  # of prefix cache if the Profile does not state the size of the KV cache


class ReplicaJob:
    """One request in an engine. Shape: `first_step` is -1 until its first token."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "first_step",
        "index",
        "last_step",
        "output_tokens",
        "prefill_left",
        "prompt_tokens",
    )

    def __init__(self, index: int, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.output_tokens = max(1, output_tokens)
        self.blocks = blocks
        self.prefill_left = prompt_tokens
        self.cached_tokens = 0  # prompt tokens of this job in the prefix cache
        self.first_step = -1
        self.last_step = -1

    @property
    def kv_tokens(self) -> int:
        """Tokens that it reserves in the KV cache."""
        return self.prompt_tokens + self.output_tokens


class StepEnd(NamedTuple):
    """The end of the current step: its time, the steps done by then, and the prompt tokens that the step computes."""

    at_s: float
    steps: int
    prompt_tokens: int


class PrefixCache:
    """The prompt blocks that an engine still holds; the least recently used is evicted first."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Prompt tokens that are not computed again; the last block always is, because it yields the first token."""
        hit = 0
        for block in blocks[:-1]:
            if block not in self._blocks:
                break
            hit += 1
        return min(hit * BLOCK_TOKENS, prompt_tokens - 1)

    def keep(self, blocks: Sequence[int]) -> None:
        """Mark blocks as just used or computed."""
        for block in blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)

    def shrink(self, blocks_max: int) -> None:
        """Evict down to so many blocks."""
        while len(self._blocks) > blocks_max:
            self._blocks.popitem(last=False)


class SimulatedReplica:
    """An engine between the ends of two steps.

    Shape: a leap of `leap_steps` equal steps began at `began_s` and ends at `ends_s`; `version` changes if a leap is
    shortened, so that the end scheduled before is ignored. The world calls `push` and, at `ends_s`, `advance`.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.slowness = 1.0
        self.up = True
        self.steps = 0
        self.began_s = self.ends_s = 0.0
        self.leap_steps = 0
        self.version = 0
        self.kv_used = 0
        self.queue: deque[ReplicaJob] = deque()
        self.prefilling: deque[ReplicaJob] = deque()
        self.decoding: list[tuple[int, int, ReplicaJob]] = []
        self._kv_max = profile.kv_tokens or float("inf")
        self._step_s = 0.0
        self._chunk = 0
        self._cache = PrefixCache()
        self._cached_by_running = 0

    @property
    def in_flight(self) -> int:
        """Jobs that were sent here and have not ended."""
        return len(self.queue) + len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        """True while no step runs."""
        return not self.leap_steps

    @property
    def kv_share(self) -> float:
        """The share of the KV cache that is reserved."""
        return self.kv_used / self._kv_max

    def pending_tokens(self) -> int:
        """Prompt tokens that are not computed yet; only the engine knows them."""
        return sum(job.prefill_left for job in self.prefilling) + sum(job.prompt_tokens for job in self.queue)

    def cached_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Prompt tokens in the prefix cache; only the engine knows them."""
        return self._cache.cached_tokens(blocks, prompt_tokens)

    def step_end(self, now_s: float) -> StepEnd:
        """The end of the current step."""
        if self.idle:
            return StepEnd(now_s, self.steps, 0)
        done = min(self.leap_steps, int((now_s - self.began_s) / self._step_s) + 1)
        return StepEnd(self.began_s + done * self._step_s, self.steps + done, self._chunk)

    def push(self, job: ReplicaJob, now_s: float) -> None:
        """Add a job to the queue; it is considered at the end of the current step."""
        self.queue.append(job)
        if self.idle:
            self.began_s = self.ends_s = now_s
            self._start()
        else:
            self._shorten(now_s)

    def slow_down(self, slowness: float, now_s: float) -> None:
        """Multiply the duration of every step from the next one on."""
        if not self.idle:
            self._shorten(now_s)
        self.slowness = slowness

    def die(self) -> list[ReplicaJob]:
        """Lose every job and the caches; returns the jobs."""
        lost = [*self.queue, *self.prefilling, *(job for _, _, job in self.decoding)]
        self.queue.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.kv_used = self.leap_steps = self._cached_by_running = 0
        self.version += 1
        self._cache = PrefixCache()
        return lost

    def advance(self) -> tuple[list[ReplicaJob], list[ReplicaJob]]:
        """End the leap and begin the next one; returns the jobs with a first token, and those that ended."""
        self.steps += self.leap_steps
        self.began_s = self.ends_s
        ended: list[ReplicaJob] = []
        while self.decoding and self.decoding[0][0] <= self.steps:
            ended.append(heappop(self.decoding)[2])
        firsts = self._prefilled() if self._chunk else []
        for job in firsts:
            job.first_step = self.steps
            job.last_step = self.steps + job.output_tokens - 1
            if job.output_tokens > 1:
                heappush(self.decoding, (job.last_step, job.index, job))
            else:
                ended.append(job)
        for job in ended:
            self.kv_used -= job.kv_tokens
            self._cached_by_running -= job.cached_tokens
        self._start()
        return firsts, ended

    def tokens_of(self, job: ReplicaJob, now_s: float) -> int:
        """Tokens that a decoding job has produced by now."""
        if job.first_step < 0:
            return 0
        # For a time before the leap (tokens still on the network) the same pace is assumed.
        done = min(self.leap_steps, floor((now_s - self.began_s) / self._step_s)) if self.leap_steps else 0
        return max(1, min(job.output_tokens, self.steps + done - job.first_step + 1))

    def _prefilled(self) -> list[ReplicaJob]:
        firsts, left = [], self._chunk
        while left and self.prefilling:
            job = self.prefilling[0]
            done = min(left, job.prefill_left)
            job.prefill_left -= done
            left -= done
            if job.prefill_left:
                break
            firsts.append(self.prefilling.popleft())
            if job.blocks:
                job.cached_tokens = min(len(job.blocks) * BLOCK_TOKENS, job.prompt_tokens)
                self._cached_by_running += job.cached_tokens
                self._cache.keep(job.blocks)
                self._shrink_cache()
        return firsts

    def _shrink_cache(self) -> None:
        """Limit the cache to what running jobs leave; their own computed prompts are in it and count once."""
        if not self.profile.kv_tokens:
            self._cache.shrink(BLOCKS_WITHOUT_KV)
            return
        free = self.profile.kv_tokens - self.kv_used + self._cached_by_running
        self._cache.shrink(max(0, free) // BLOCK_TOKENS)

    def _start(self) -> None:
        """Admit the jobs that fit, and begin the next step or leap."""
        self.version += 1
        free_slots = self.profile.batch_max - len(self.prefilling) - len(self.decoding)
        while self.queue and free_slots > 0:
            job = self.queue[0]
            if self.kv_used and self.kv_used + job.kv_tokens > self._kv_max:
                break  # the head of the queue blocks: first come, first served
            self.queue.popleft()
            self.kv_used += job.kv_tokens
            if job.blocks:
                cached = self.cached_tokens(job.blocks, job.prompt_tokens)
                job.prefill_left = job.prompt_tokens - cached
                self._cache.keep(job.blocks[: cached // BLOCK_TOKENS])
            self._shrink_cache()
            self.prefilling.append(job)
            free_slots -= 1
        batch = len(self.decoding)
        self._chunk = 0
        for job in self.prefilling:
            self._chunk += job.prefill_left
            if self._chunk >= CHUNK_TOKENS:
                self._chunk = CHUNK_TOKENS
                break
        if not batch and not self._chunk:
            self.leap_steps = 0
            return
        profile = self.profile
        decode_s = profile.base_s + profile.per_sequence_s * batch if batch else 0.0
        self._step_s = (decode_s + self._chunk / profile.prefill_tokens_per_s) * self.slowness
        self.leap_steps = 1 if self._chunk else self.decoding[0][0] - self.steps
        self.ends_s = self.began_s + self.leap_steps * self._step_s

    def _shorten(self, now_s: float) -> None:
        """End the leap with the current step."""
        steps = int((now_s - self.began_s) / self._step_s) + 1
        if steps < self.leap_steps:
            self.leap_steps = steps
            self.ends_s = self.began_s + steps * self._step_s
            self.version += 1
