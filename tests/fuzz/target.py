"""What a fuzz target is, and how one is driven: inputs by number, each made from the seed and its number alone."""

import random
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

SLOW_S = 0.05  # FAULTS.md rows 37 and 92: no input may keep the processor longer
TRIES = 5  # of a slow input: a busy machine can make one look slow, not five


class Target(Protocol):
    """One parser under fuzzing."""

    name: str

    def make(self, rng: random.Random) -> bytes:
        """An input."""

    def check(self, data: bytes, rng: random.Random) -> None:
        """Feed it.

        Raises: `AssertionError` for a wrong answer; anything else is a crash of the parser.
        """


class Found(msgspec.Struct):
    """An input with a wrong outcome."""

    target: str
    seed: int
    number: int
    data: bytes
    what: str

    def __str__(self) -> str:
        again = f"python -m tests.fuzz {self.target} --seed {self.seed} --first {self.number} --inputs 1"
        return f"{self.target}: {self.what}\n  input: {self.data[:2000]!r}\n  again: {again}"


def attack(
    target: Target, seed: int, numbers: range, tell: Callable[[int], None] = lambda done: None, found_max: int = 1
) -> list[Found]:
    """Run these inputs; what was found. Shape: an input depends on target, seed and its number and on nothing else."""
    found: list[Found] = []
    for number in numbers:
        rng = random.Random(f"{target.name} {seed} {number}")
        data = target.make(rng)
        state = rng.getstate()
        began_s = time.thread_time()
        try:
            target.check(data, rng)
        except Exception as error:
            found.append(Found(target.name, seed, number, data, f"{type(error).__name__}: {error}"))
        else:
            spent_s = time.thread_time() - began_s
            if spent_s > SLOW_S and _always_slow(target, data, rng, state):
                found.append(Found(target.name, seed, number, data, f"took {spent_s * 1000:.0f} ms of processor time"))
        if len(found) >= found_max:
            return found
        tell(number)
    return found


def _always_slow(target: Target, data: bytes, rng: random.Random, state: tuple[object, ...]) -> bool:
    for _ in range(TRIES):
        rng.setstate(state)
        began_s = time.thread_time()
        target.check(data, rng)
        if time.thread_time() - began_s < SLOW_S:
            return False
    return True
