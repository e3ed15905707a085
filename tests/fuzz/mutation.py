"""Seeded damage to bytes: the same seed gives the same inputs on every machine."""

import random
from collections.abc import Sequence

CHANGES_MAX = 4
SEAMS = frozenset(b'\r\n:;,{}[]" ')  # next to these is where formats break
SPAN_MAX = 12  # bytes that one change cuts out or doubles; now and then far more


class Mutator:
    """Damages examples. Shape: `tokens` are the words of a format that are worth putting in at wrong places."""

    def __init__(self, rng: random.Random, tokens: Sequence[bytes]) -> None:
        self.rng = rng
        self._tokens = tokens

    def damage(self, data: bytes) -> bytes:
        """The data with one to four changes; one time in sixteen as it is."""
        rng = self.rng
        if rng.random() < 1 / 16:
            return data
        changed = bytearray(data)
        for _ in range(rng.randint(1, CHANGES_MAX)):
            self._change(changed)
        return bytes(changed)

    def _change(self, data: bytearray) -> None:
        rng = self.rng
        at = rng.randint(0, len(data))
        if rng.random() < 0.5:
            while at < len(data) and not (at and data[at - 1] in SEAMS):
                at += 1
        span = rng.randint(1, SPAN_MAX) if rng.random() < 0.9 else rng.randint(1, len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind in (4, 5):
            data[at:at] = rng.choice(self._tokens)
        elif kind == 6:
            data[at : at + span] = rng.choice(self._tokens)
        elif kind == 7:
            other = rng.randint(0, len(data))
            data[at:at] = data[other : other + span]
        else:
            digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789abcdef+-")

    def cut(self, data: bytes) -> list[bytes]:
        """The data in one piece, in a few, or byte by byte, as a network may deliver it."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.4 or len(data) < 2:
            return [data]
        if kind < 0.45 and len(data) < 600:
            return [data[at : at + 1] for at in range(len(data))]
        places = sorted(rng.randrange(len(data)) for _ in range(rng.randint(1, 4)))
        return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a < b]
