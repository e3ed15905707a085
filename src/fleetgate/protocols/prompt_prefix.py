"""Prompts with a common prefix, recognised by digests of their bytes: nothing is tokenised on the request path."""

from collections.abc import Sequence
from hashlib import blake2b

BLOCK_BYTES = 2048  # about 512 tokens of English
BLOCKS_MAX = 64  # more than 128 KiB in common change no choice
_DIGEST_BYTES = 12  # a collision costs a preference, nothing else
# The keys before the prompt, by operation. Members before them (model, temperature) differ between equal prompts.
_MARKS = (b'"messages"', b'"prompt"', b'"input"')


def chain_of(body: bytes, session: bytes = b"", marks: Sequence[bytes] = _MARKS) -> tuple[bytes, ...]:
    """A digest of each prefix of the prompt, block by block, then the name of the session if there is one.

    Shape: `marks` are the keys before the prompt; the first one that occurs counts.
    Cost: 0.2 µs for a body below one block, 2 µs a block.
    """
    start = -1
    if len(body) >= BLOCK_BYTES:
        start = next((at for mark in marks if (at := body.find(mark)) >= 0), 0)
    chain = []
    if start >= 0:
        state = blake2b(digest_size=_DIGEST_BYTES)
        # The last part is never a whole block: the next turn of a chat differs at its end.
        for at in range(start, min(len(body) - BLOCK_BYTES, start + BLOCKS_MAX * BLOCK_BYTES) + 1, BLOCK_BYTES):
            state.update(body[at : at + BLOCK_BYTES])
            chain.append(state.digest())
    if session:
        chain.append(b"s:" + session)
    return tuple(chain)
