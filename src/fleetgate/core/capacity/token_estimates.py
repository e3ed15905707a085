"""How many tokens prompts and responses have, estimated from traffic; nothing is learned while a model is idle."""

from collections import OrderedDict

KEYS_MAX = 4096  # output lengths are remembered for this many keys and models, the least recent are forgotten
OUTPUT_TOKENS_FIRST = 200.0  # the reference shape, until an answer has told better
TOKENS_PER_BYTE_FIRST = 0.25  # English text with any current tokenizer, within a third
LENGTH_SHARE = 0.05  # of a new observation in a running mean: about the last forty count


class TokenEstimates:
    """What a model's answers and prompts usually measure, in tokens."""

    __slots__ = ("_output", "_per_byte")

    def __init__(self) -> None:
        self._output: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._per_byte: dict[str, float] = {}

    def output_tokens(self, model: str, key: str, tokens_max: int = 0) -> float:
        """Expected output: what this key, else this model, usually gets, never more than the request allows."""
        known = self._output.get((model, key)) or self._output.get((model, "")) or OUTPUT_TOKENS_FIRST
        return min(known, tokens_max) if tokens_max else known

    def prompt_tokens(self, model: str, body_bytes: int) -> float:
        """Expected prompt tokens of a body."""
        return body_bytes * self._per_byte.get(model, TOKENS_PER_BYTE_FIRST)

    def record_output(self, model: str, key: str, tokens: int) -> None:
        """An answer ended."""
        for name in ((model, key), (model, "")):
            before = self._output.pop(name, float(tokens))
            self._output[name] = before + LENGTH_SHARE * (tokens - before)
        if len(self._output) > KEYS_MAX:
            self._output.popitem(last=False)

    def record_prompt(self, model: str, body_bytes: int, tokens: int) -> None:
        """A usage came back."""
        seen = tokens / max(1, body_bytes)
        before = self._per_byte.get(model, seen)
        self._per_byte[model] = before + LENGTH_SHARE * (seen - before)
