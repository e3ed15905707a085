"""The scheduler of a simulated engine: slots, a queue, prefill one after the other, decode steps for the whole batch.

It does no I/O: the caller passes the time, and gets the sequences with new tokens.
"""

from collections import deque
from typing import Generic, TypeVar

import msgspec

NEVER_S = float("inf")


class Speeds(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of the engine. Units: seconds of a step = base + per sequence × batch; 0 takes no time."""

    prefill_tokens_per_s: float = 0.0
    decode_base_s: float = 0.0
    decode_per_sequence_s: float = 0.0

    def prefill_s(self, tokens: int) -> float:
        """Seconds of the prefill of a prompt."""
        return tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s > 0 else 0.0

    def step_s(self, batch: int) -> float:
        """Seconds of one decode step of a batch."""
        return self.decode_base_s + self.decode_per_sequence_s * batch


class TokenSequence:
    """One response being generated. Shape: `made` counts the tokens generated, `sent` those written to the client."""

    __slots__ = ("made", "output_tokens", "prefill_end_s", "prompt_tokens", "sent")

    def __init__(self, prompt_tokens: int, output_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = max(1, output_tokens)
        self.made = 0
        self.sent = 0
        self.prefill_end_s = NEVER_S

    @property
    def finished(self) -> bool:
        """True once every token is generated."""
        return self.made >= self.output_tokens


SequenceT = TypeVar("SequenceT", bound=TokenSequence)


class Batch(Generic[SequenceT]):
    """The running and waiting sequences, and the time of the next token.

    Sequences beyond `slots` wait in order of arrival; `submit` refuses one if `queue_max` already wait.
    """

    def __init__(self, speeds: Speeds, slots: int, queue_max: int) -> None:
        self._speeds = speeds
        self._slots = slots
        self._queue_max = queue_max
        self._waiting: dict[SequenceT, None] = {}
        self._prefilling: deque[SequenceT] = deque()
        self._decoding: dict[SequenceT, None] = {}
        self._prefill_free_s = 0.0
        self._step_at_s = NEVER_S
        self._produced: dict[SequenceT, None] = {}
        self.prompt_tokens_total = 0
        self.output_tokens_total = 0
        self.steps_total = 0

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def kv_tokens(self) -> int:
        """Tokens of the sequences in slots, in the KV cache."""
        held = (*self._prefilling, *self._decoding)
        return sum(sequence.prompt_tokens + sequence.made for sequence in held)

    @property
    def next_s(self) -> float:
        """The time of the next token, `NEVER_S` if no sequence runs."""
        prefill_s = self._prefilling[0].prefill_end_s if self._prefilling else NEVER_S
        return min(prefill_s, self._step_at_s)

    def submit(self, sequence: SequenceT, now_s: float) -> bool:
        """Add a sequence; false if the queue is full."""
        if self.running < self._slots:
            self._admit(sequence, now_s)
        elif len(self._waiting) < self._queue_max:
            self._waiting[sequence] = None
        else:
            return False
        return True

    def cancel(self, sequence: SequenceT, now_s: float) -> None:
        """Remove a sequence after its client disconnected; its slot is free at once."""
        self._produced.pop(sequence, None)
        if sequence in self._waiting:
            del self._waiting[sequence]
        elif sequence in self._decoding:
            del self._decoding[sequence]
            self._after_release(now_s)
        elif sequence in self._prefilling:
            self._cancel_prefill(sequence, now_s)
            self._after_release(now_s)

    def advance(self, now_s: float) -> list[SequenceT]:
        """Do all work that is due; returns the sequences with new tokens, each once."""
        while (at_s := self.next_s) <= now_s:
            if self._prefilling and self._prefilling[0].prefill_end_s == at_s:
                self._end_prefill(at_s)
            else:
                self._step(at_s)
        produced, self._produced = list(self._produced), {}
        return produced

    def _admit(self, sequence: SequenceT, now_s: float) -> None:
        start_s = max(now_s, self._prefill_free_s)
        sequence.prefill_end_s = self._prefill_free_s = start_s + self._speeds.prefill_s(sequence.prompt_tokens)
        self._prefilling.append(sequence)

    def _cancel_prefill(self, sequence: SequenceT, now_s: float) -> None:
        """Remove a sequence from the prefill queue; those behind it start earlier by its remaining work."""
        end_s = sequence.prefill_end_s
        start_s = end_s - self._speeds.prefill_s(sequence.prompt_tokens)
        saved_s = end_s - min(end_s, max(start_s, now_s))
        self._prefilling.remove(sequence)
        for other in self._prefilling:
            if other.prefill_end_s > end_s:
                other.prefill_end_s -= saved_s
        self._prefill_free_s -= saved_s

    def _end_prefill(self, at_s: float) -> None:
        sequence = self._prefilling.popleft()
        self.prompt_tokens_total += sequence.prompt_tokens
        self._emit(sequence, 1)
        if sequence.finished:
            self._after_release(at_s)
            return
        self._decoding[sequence] = None
        if self._step_at_s == NEVER_S:
            self._step_at_s = at_s + self._speeds.step_s(len(self._decoding))

    def _step(self, at_s: float) -> None:
        self.steps_total += 1
        # Steps that take no time are done at once, so that a load test does not pay for each.
        at_once = self._speeds.step_s(len(self._decoding)) == 0
        for sequence in tuple(self._decoding):
            self._emit(sequence, sequence.output_tokens - sequence.made if at_once else 1)
            if sequence.finished:
                del self._decoding[sequence]
        self._step_at_s = at_s + self._speeds.step_s(len(self._decoding))
        self._after_release(at_s)

    def _emit(self, sequence: SequenceT, tokens: int) -> None:
        sequence.made += tokens
        self.output_tokens_total += tokens
        self._produced[sequence] = None

    def _after_release(self, now_s: float) -> None:
        if not self._decoding:
            self._step_at_s = NEVER_S
        while self._waiting and self.running < self._slots:
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._admit(first, now_s)
