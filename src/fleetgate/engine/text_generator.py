"""Text of a simulated engine: a prompt gets the same text on every engine with the same seed."""

import hashlib
import json

_TEXT = """
the a one some each every this that our your and or but so then when while after before until with without over under
into from near along across light water river stone field forest garden window table paper letter number answer question
reason story morning evening summer winter season moment minute hour week year north south east west centre corner edge
surface root branch leaf seed grain bread fruit apple honey salt sugar coffee kettle basket bottle silver copper iron
glass cotton wool thread needle hammer ladder engine wheel bridge tower harbor market village city road path journey map
signal circle square line curve angle weight measure balance pattern color green blue amber violet crimson white quiet
gentle steady bright simple patient honest careful common ancient modern narrow broad hollow solid distant familiar
carry follow gather build mend open close begin finish remember forget listen speak answers borrow return travel wander
wait turn lift lower draw paint write read count measures share keep give find leave reach cross climb descend float
settle grow change move rest learn teach notice wonder slowly quickly softly clearly often always seldom perhaps nearly
almost together alone again once twice already still yet soon later here there everywhere inside outside above below
between among beyond toward against because although unless whether however therefore instead indeed meanwhile
"""
WORDS = tuple(dict.fromkeys(_TEXT.split()))
_PIECE_CHARS = 4  # a token of JSON text, as tokens of prompts are counted


class TextGenerator:
    """A source of words for one prompt. Shape: the words depend only on `seed` and `prompt`."""

    __slots__ = ("_digest",)

    def __init__(self, seed: int, prompt: bytes) -> None:
        self._digest = hashlib.blake2b(prompt, digest_size=64, key=b"%d" % seed).digest()

    def number(self, index: int) -> int:
        """The number at an index."""
        return self._digest[index & 63] * 7 + self._digest[(index >> 6) & 63] * 3 + index

    def word(self, index: int) -> str:
        """The word at an index."""
        return WORDS[self.number(index) % len(WORDS)]

    def pieces(self, tokens: int) -> list[str]:
        """Tokens of text: one word each, all but the first with a leading space."""
        word = self.word
        return [word(0), *(" " + word(index) for index in range(1, tokens))] if tokens else []

    def vector(self, dimensions: int) -> list[float]:
        """An embedding of length 1."""
        raw = [(self.number(index * 5) % 251 - 125) / 125 + 1e-3 for index in range(dimensions)]
        norm = sum(value * value for value in raw) ** 0.5
        return [value / norm for value in raw]


def json_pieces(value: object) -> list[str]:
    """A value as JSON, cut into tokens."""
    text = json.dumps(value, ensure_ascii=False)
    return [text[at : at + _PIECE_CHARS] for at in range(0, len(text), _PIECE_CHARS)]
