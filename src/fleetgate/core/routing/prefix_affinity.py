"""Who has seen a prompt before: sessions and prompt prefixes, as a bounded preference in any strategy.

A prompt is known by the digests of its first 1, 2, 3 … blocks, each of which stands for all that comes before it. What
an engine still holds in its cache only the engine knows; this is where the text went last.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

BLOCK_TOKENS = 512  # coarse: a shorter shared prefix saves less than choosing by load does
BLOCKS_MAX = 65_536  # a worker's memory for them, about 10 MB; the least recent are forgotten

# How far the preference goes: bounded-load hashing's 1.25 inside a rank of `overflow`, half a prompt at least, and one
# turn of `capacity_round_robin`.
WARM_LOAD_MAX = 1.25
WARM_SHARE_MIN = 0.5
WARM_CREDIT = 1.0


class WarmPrefix(NamedTuple):
    """Where a prompt's beginning went last; slot -1 for nowhere."""

    endpoint_slot: int = -1
    blocks: int = 0


COLD = WarmPrefix()


class PrefixAffinity:
    """The blocks of one Lane in one proxy. Cost: 0.1 µs a block."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, int] = OrderedDict()

    def find(self, chain: Sequence[Hashable]) -> WarmPrefix:
        """The Endpoint that saw the longest beginning of this prompt."""
        seen = self._seen
        for blocks in range(len(chain), 0, -1):
            endpoint_slot = seen.get(chain[blocks - 1])
            if endpoint_slot is not None:
                return WarmPrefix(endpoint_slot, blocks)
        return COLD

    def record(self, chain: Sequence[Hashable], endpoint_slot: int) -> None:
        """This prompt goes to that Endpoint now."""
        seen = self._seen
        for digest in chain:
            seen[digest] = endpoint_slot
            seen.move_to_end(digest)
        while len(seen) > BLOCKS_MAX:
            seen.popitem(last=False)
