"""How many tokens prompts and responses have, estimated from earlier requests for the same model."""

from collections import OrderedDict

KEYS_MAX = 4096  # pairs of model and key with a remembered output length; the least recently used are dropped
OUTPUT_TOKENS_FIRST = 200.0  # the reference request, until a response was seen
TOKENS_PER_BYTE_FIRST = 0.25  # English text with any current tokenizer, within a third
LENGTH_SHARE = 0.05  # weight of a new observation in the running mean: about the last forty count


class TokenEstimates:
    """The usual lengths of a model's prompts and responses, in tokens."""

    __slots__ = ("_output", "_per_byte")

    def __init__(self) -> None:
        self._output: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._per_byte: dict[str, float] = {}

    def output_tokens(self, model: str, key: str, tokens_max: int = 0) -> float:
        """Expected output tokens: the mean of this key, else of this model, and at most what the request allows."""
        known = self._output.get((model, key)) or self._output.get((model, "")) or OUTPUT_TOKENS_FIRST
        return min(known, tokens_max) if tokens_max else known

    def prompt_tokens(self, model: str, body_bytes: int) -> float:
        """Expected prompt tokens of a request body."""
        return body_bytes * self._per_byte.get(model, TOKENS_PER_BYTE_FIRST)

    def record_output(self, model: str, key: str, tokens: int) -> None:
        """A response ended with so many output tokens."""
        for name in ((model, key), (model, "")):
            before = self._output.pop(name, float(tokens))
            self._output[name] = before + LENGTH_SHARE * (tokens - before)
        if len(self._output) > KEYS_MAX:
            self._output.popitem(last=False)

    def record_prompt(self, model: str, body_bytes: int, tokens: int) -> None:
        """An engine reported the prompt tokens of a request body."""
        observed = tokens / max(1, body_bytes)
        before = self._per_byte.get(model, observed)
        self._per_byte[model] = before + LENGTH_SHARE * (observed - before)
