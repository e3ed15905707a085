"""One simulated engine: chunked prefill that shares its steps with decoding, first come first served, KV reserved.

A step takes `(base_s + per_sequence_s × b if b else 0) + c / prefill_tokens_per_s` with b sequences decoding and
c ≤ 2048 prompt tokens of the oldest prompts. While nothing changes, many steps are leapt over at once.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from math import floor
from typing import NamedTuple

from fleetgate.core.capacity.latency_model import CHUNK_TOKENS
from fleetgate.core.model import Profile

BLOCK_TOKENS = 512
BLOCKS_WITHOUT_KV = 200_000  # of prefix cache where the Profile does not say how large the KV cache is


class ReplicaJob:
    """One request in an engine. Shape: `first_step` -1 until its first token."""

    __slots__ = (
        "blocks",
        "cached_by",
        "first_step",
        "identity",
        "last_step",
        "output_tokens",
        "prefill_left",
        "prompt_tokens",
    )

    def __init__(self, identity: int, prompt_tokens: int, output_tokens: int, blocks: tuple[int, ...] = ()) -> None:
        self.identity = identity
        self.prompt_tokens = prompt_tokens
        self.output_tokens = max(1, output_tokens)
        self.blocks = blocks
        self.prefill_left = prompt_tokens
        self.cached_by = 0  # prompt tokens that the prefix cache has from it
        self.first_step = -1
        self.last_step = -1

    @property
    def kv_tokens(self) -> int:
        """What it reserves."""
        return self.prompt_tokens + self.output_tokens


class Boundary(NamedTuple):
    """The end of the step under way: when, how many steps are done by then, and the prompt tokens that it computes."""

    at_s: float
    steps: int
    prompt_tokens: int


class PrefixCache:
    """The prompt blocks that an engine still holds, least recently used first out."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Prompt tokens that need not be computed; the last block always is, for it yields the answer."""
        hit = 0
        for block in blocks[:-1]:
            if block not in self._blocks:
                break
            hit += 1
        return min(hit * BLOCK_TOKENS, prompt_tokens - 1)

    def keep(self, blocks: Sequence[int]) -> None:
        """A prompt uses these, or has just been computed."""
        for block in blocks:
            self._blocks[block] = None
            self._blocks.move_to_end(block)

    def shrink(self, blocks_max: int) -> None:
        """Make room."""
        while len(self._blocks) > blocks_max:
            self._blocks.popitem(last=False)


class SimulatedReplica:
    """An engine between two boundaries of its steps.

    Shape: a leap of `leap_steps` equal steps began at `began_s` and ends at `ends_s`; `version` tells a leap that was
    cut short from the one that was announced. The world calls `push` and, at `ends_s`, `advance`.
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
        """Everything that was sent here and has not ended."""
        return len(self.queue) + len(self.prefilling) + len(self.decoding)

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return not self.leap_steps

    @property
    def kv_share(self) -> float:
        """The part of the KV cache that is reserved."""
        return self.kv_used / self._kv_max

    def pending_tokens(self) -> int:
        """Prompt tokens that are still to be computed; known to the engine alone."""
        return sum(job.prefill_left for job in self.prefilling) + sum(job.prompt_tokens for job in self.queue)

    def cached_tokens(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """What of a prompt need not be computed here; known to the engine alone."""
        return self._cache.cached_tokens(blocks, prompt_tokens)

    def boundary(self, now_s: float) -> Boundary:
        """Where the step under way ends."""
        if self.idle:
            return Boundary(now_s, self.steps, 0)
        done = min(self.leap_steps, int((now_s - self.began_s) / self._step_s) + 1)
        return Boundary(self.began_s + done * self._step_s, self.steps + done, self._chunk)

    def push(self, job: ReplicaJob, now_s: float) -> None:
        """A request arrives; it is looked at when the step under way ends."""
        self.queue.append(job)
        if self.idle:
            self.began_s = self.ends_s = now_s
            self._start()
        else:
            self._cut(now_s)

    def slow_down(self, slowness: float, now_s: float) -> None:
        """From the next step on every second of work takes so many."""
        if not self.idle:
            self._cut(now_s)
        self.slowness = slowness

    def die(self) -> list[ReplicaJob]:
        """Everything that was here is lost."""
        lost = [*self.queue, *self.prefilling, *(job for _, _, job in self.decoding)]
        self.queue.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self.kv_used = self.leap_steps = self._cached_by_running = 0
        self.version += 1
        self._cache = PrefixCache()
        return lost

    def advance(self) -> tuple[list[ReplicaJob], list[ReplicaJob]]:
        """The leap is over: who got a first token, and who ended. Then the next one begins."""
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
                heappush(self.decoding, (job.last_step, job.identity, job))
            else:
                ended.append(job)
        for job in ended:
            self.kv_used -= job.kv_tokens
            self._cached_by_running -= job.cached_by
        self._start()
        return firsts, ended

    def tokens_of(self, job: ReplicaJob, now_s: float) -> int:
        """Tokens that a decoding request has brought by now."""
        if job.first_step < 0:
            return 0
        # Before the leap began, for a stream whose tokens are still on their way, the same pace is assumed.
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
                job.cached_by = min(len(job.blocks) * BLOCK_TOKENS, job.prompt_tokens)
                self._cached_by_running += job.cached_by
                self._cache.keep(job.blocks)
                self._shrink()
        return firsts

    def _shrink(self) -> None:
        """The cache has what running requests leave; their own prompts, once computed, are in it and count once."""
        if not self.profile.kv_tokens:
            self._cache.shrink(BLOCKS_WITHOUT_KV)
            return
        free = self.profile.kv_tokens - self.kv_used + self._cached_by_running
        self._cache.shrink(max(0, free) // BLOCK_TOKENS)

    def _start(self) -> None:
        """Admit who fits, and begin the next step or leap."""
        self.version += 1
        places = self.profile.batch_max - len(self.prefilling) - len(self.decoding)
        while self.queue and places > 0:
            job = self.queue[0]
            if self.kv_used and self.kv_used + job.kv_tokens > self._kv_max:
                break  # the head blocks: first come, first served
            self.queue.popleft()
            self.kv_used += job.kv_tokens
            if job.blocks:
                cached = self.cached_tokens(job.blocks, job.prompt_tokens)
                job.prefill_left = job.prompt_tokens - cached
                self._cache.keep(job.blocks[: cached // BLOCK_TOKENS])
            self._shrink()
            self.prefilling.append(job)
            places -= 1
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

    def _cut(self, now_s: float) -> None:
        """End the leap with the step that is under way."""
        steps = int((now_s - self.began_s) / self._step_s) + 1
        if steps < self.leap_steps:
            self.leap_steps = steps
            self.ends_s = self.began_s + steps * self._step_s
            self.version += 1
