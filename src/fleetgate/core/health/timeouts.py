"""How long a Deployment may be silent before an attempt counts as lost, learned from its own requests.

Source: faults.md rows 6 and 8.
"""

FIRST_MIN_S, FIRST_MAX_S = 5.0, 300.0
FIRST_FACTOR = 3.0  # times the prediction
FIRST_UNKNOWN_S = 60.0  # without a Profile and with too few first tokens seen
FIRST_ALIVE_S = 2.0  # an engine that sent any first token this recently is working, however long others wait
WHOLE_MIN_S, WHOLE_MAX_S = 30.0, 600.0  # of a response that is not streamed; the maximum is that of the official SDKs
WHOLE_FACTOR = 3.0
STALL_MIN_S, STALL_MAX_S = 5.0, 60.0
STALL_UNKNOWN_S = 15.0  # before enough streams of a Deployment were seen
STALL_TOKENS = 20.0  # times the slow end of its time per token
STALL_GAPS = 2.0  # times its longest silence after which the stream continued
STREAMS_MIN = 20
DECAY = 0.99  # of a slow end, for each faster observation


def first_event_s(predicted_s: float | None) -> float:
    """The timeout of a stream's first event. Shape: `predicted_s` is None without a prediction."""
    if predicted_s is None:
        return FIRST_UNKNOWN_S
    return min(FIRST_MAX_S, max(FIRST_MIN_S, FIRST_FACTOR * predicted_s))


def whole_answer_s(first_s: float | None, token_s: float | None, tokens_max: int) -> float:
    """The timeout of a response that is not streamed, which sends nothing until it is complete.

    Shape: `tokens_max` is the most output tokens that the client asked for, 0 for unknown; the others are None if
    unknown.
    """
    if not tokens_max or token_s is None:
        return WHOLE_MAX_S
    return min(WHOLE_MAX_S, max(WHOLE_MIN_S, WHOLE_FACTOR * ((first_s or 0.0) + token_s * tokens_max)))


class FirstTokenTimes:
    """How long first tokens of one Deployment take, by the size of the request in powers of two.

    It follows the slow end, about the slowest in a hundred: a slower observation counts at once, a faster one lets the
    value decay. Cost: 0.3 µs to read.
    """

    __slots__ = ("_count", "_last_s", "_slow_s")

    def __init__(self) -> None:
        self._slow_s: dict[int, float] = {}
        self._count = 0
        self._last_s = float("-inf")

    def record(self, body_bytes: int, ttft_s: float, now_s: float) -> None:
        """A first token came."""
        self._count += 1
        self._last_s = now_s
        size = body_bytes.bit_length()
        self._slow_s[size] = max(ttft_s, DECAY * self._slow_s.get(size, 0.0))

    def record_waiting(self, body_bytes: int, waited_s: float, now_s: float) -> None:
        """A request still waits for its first token.

        While other requests still receive first tokens, long waits raise the first-event timeout; otherwise they do
        not, because the engine may be lost.
        """
        if now_s - self._last_s <= FIRST_ALIVE_S:
            size = body_bytes.bit_length()
            self._slow_s[size] = max(waited_s, self._slow_s.get(size, 0.0))

    def expected_s(self, body_bytes: int) -> float | None:
        """The slow end for a request of this size, None if too few were seen.

        For a size not seen yet it is scaled up from smaller requests in proportion, or is that of the fastest larger
        one.
        """
        if self._count < STREAMS_MIN:
            return None
        size = body_bytes.bit_length()
        known_s = self._slow_s.get(size)
        if known_s is not None:
            return known_s
        smaller = [slow_s * 2.0 ** (size - other) for other, slow_s in self._slow_s.items() if other < size]
        return max(smaller) if smaller else min(self._slow_s.values())


class StreamTiming:
    """How one Deployment streams, as one proxy sees it.

    It follows the slow end, about the slowest in a hundred, without samples: a slower observation counts at once, a
    faster one lets the value decay. Cost: 0.2 µs a stream.
    """

    __slots__ = ("_gap_s", "_streams", "_tpot_s", "_whole_token_s", "_wholes", "first_tokens")

    def __init__(self) -> None:
        self.first_tokens = FirstTokenTimes()
        self._tpot_s = 0.0
        self._gap_s = 0.0
        self._streams = 0
        self._whole_token_s = 0.0
        self._wholes = 0

    def record_response(self, token_s: float) -> None:
        """An unstreamed response is complete. Units: seconds per token, the share of its prompt included."""
        self._wholes += 1
        self._whole_token_s = max(token_s, DECAY * self._whole_token_s)

    @property
    def token_s(self) -> float | None:
        """The slow end of the time per token in an unstreamed response, None if too few were seen."""
        if self._wholes >= STREAMS_MIN:
            return self._whole_token_s
        return self._tpot_s if self._streams >= STREAMS_MIN else None

    def record_stream(self, tpot_s: float) -> None:
        """A stream is complete. Units: seconds per token over its whole length."""
        self._streams += 1
        self._tpot_s = max(tpot_s, DECAY * self._tpot_s)
        self._gap_s *= DECAY

    def record_gap(self, silent_s: float) -> None:
        """A stream was silent for so long and then continued."""
        self._gap_s = max(self._gap_s, silent_s)

    @property
    def stall_s(self) -> float:
        """How long a stream of the Deployment may be silent."""
        if self._streams < STREAMS_MIN:
            return max(STALL_UNKNOWN_S, self._longest_s)
        return self._longest_s

    @property
    def _longest_s(self) -> float:
        longest_s = max(STALL_TOKENS * self._tpot_s, STALL_GAPS * self._gap_s)
        return min(STALL_MAX_S, max(STALL_MIN_S, longest_s))
