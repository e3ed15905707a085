"""Prefix affinity: sessions and prompt prefixes prefer the Endpoint that saw them last, within bounds, in any strategy.

A prompt is known by the digests of its first 1, 2, 3 … blocks; each digest covers all blocks before it. Only the engine
knows what its cache still holds; this table knows where the text went last.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

BLOCK_TOKENS = 512  # coarse: a shorter shared prefix saves less than a choice by load does
BLOCKS_MAX = 65_536  # about 10 MB in each worker; the least recently used are dropped

# Bounds of the preference: inside a rank of `overflow` 1.25 times the mean load (as bounded-load consistent hashing
# does) and at least half of the prompt; in `capacity_round_robin` one turn.
WARM_LOAD_MAX = 1.25
WARM_SHARE_MIN = 0.5
WARM_CREDIT = 1.0


class WarmPrefix(NamedTuple):
    """The Endpoint that saw the beginning of a prompt last; slot -1 for none."""

    endpoint_slot: int = -1
    blocks: int = 0


COLD = WarmPrefix()


class PrefixAffinity:
    """The prompt blocks of one model route in one proxy. Cost: 0.1 µs a block."""

    __slots__ = ("_endpoint_slots",)

    def __init__(self) -> None:
        self._endpoint_slots: OrderedDict[Hashable, int] = OrderedDict()

    def find(self, digests: Sequence[Hashable]) -> WarmPrefix:
        """The Endpoint that saw the longest beginning of this prompt."""
        endpoint_slots = self._endpoint_slots
        for blocks in range(len(digests), 0, -1):
            endpoint_slot = endpoint_slots.get(digests[blocks - 1])
            if endpoint_slot is not None:
                return WarmPrefix(endpoint_slot, blocks)
        return COLD

    def record(self, digests: Sequence[Hashable], endpoint_slot: int) -> None:
        """This prompt goes to that Endpoint now."""
        endpoint_slots = self._endpoint_slots
        for digest in digests:
            endpoint_slots[digest] = endpoint_slot
            endpoint_slots.move_to_end(digest)
        while len(endpoint_slots) > BLOCKS_MAX:
            endpoint_slots.popitem(last=False)
