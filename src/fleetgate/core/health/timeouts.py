"""How long a Deployment may be silent before it counts as lost: by what it promised, and by how it streams.

Source: FAULTS.md rows 6 and 8.
"""

FIRST_MIN_S, FIRST_MAX_S = 5.0, 300.0
FIRST_FACTOR = 3.0  # times what was predicted
FIRST_UNKNOWN_S = 60.0  # where no Profile predicts and too few first tokens were seen
FIRST_ALIVE_S = 2.0  # an engine that brought somebody's first token so lately is at work, however long others wait
WHOLE_MIN_S, WHOLE_MAX_S = 30.0, 600.0  # of an answer that is not streamed; the upper one is the official SDKs' own
WHOLE_FACTOR = 3.0
STALL_MIN_S, STALL_MAX_S = 5.0, 60.0
STALL_UNKNOWN_S = 15.0  # before a Deployment has been seen to stream
STALL_TOKENS = 20.0  # times the slow end of its time per token
STALL_GAPS = 2.0  # times the longest silence that it came back from
STREAMS_MIN = 20  # streams
DECAY = 0.99  # a slow end is forgotten by so much with each stream that was quicker


def first_event_s(predicted_s: float | None) -> float:
    """How long the first event of a stream may take, None where nothing is predicted."""
    if predicted_s is None:
        return FIRST_UNKNOWN_S
    return min(FIRST_MAX_S, max(FIRST_MIN_S, FIRST_FACTOR * predicted_s))


def whole_answer_s(first_s: float | None, token_s: float | None, tokens_max: int) -> float:
    """How long an answer that is not streamed may take, which shows nothing until it is whole.

    Shape: `tokens_max` is what its client asked for at most; 0, and None for the others, where it is not known.
    """
    if not tokens_max or token_s is None:
        return WHOLE_MAX_S
    return min(WHOLE_MAX_S, max(WHOLE_MIN_S, WHOLE_FACTOR * ((first_s or 0.0) + token_s * tokens_max)))


class FirstTokenTimes:
    """How long first tokens of one Deployment take, by the size of the request in powers of two.

    Only the slow end is kept: what is slower counts at once, what is quicker lets it fade. Cost: 0.3 µs to ask.
    """

    __slots__ = ("_at_s", "_seen", "_slow_s")

    def __init__(self) -> None:
        self._slow_s: dict[int, float] = {}
        self._seen = 0
        self._at_s = float("-inf")

    def record(self, body_bytes: int, ttft_s: float, now_s: float) -> None:
        """A first token came."""
        self._seen += 1
        self._at_s = now_s
        size = body_bytes.bit_length()
        self._slow_s[size] = max(ttft_s, DECAY * self._slow_s.get(size, 0.0))

    def record_waiting(self, body_bytes: int, waited_s: float, now_s: float) -> None:
        """A request waits so long already: where others are served that is the pace of now, else it tells nothing."""
        if now_s - self._at_s <= FIRST_ALIVE_S:
            size = body_bytes.bit_length()
            self._slow_s[size] = max(waited_s, self._slow_s.get(size, 0.0))

    def expected_s(self, body_bytes: int) -> float | None:
        """The slow end for a request of this size, None while too little was seen.

        From smaller ones it is taken to grow with the size, from larger ones not to shrink.
        """
        if self._seen < STREAMS_MIN:
            return None
        size = body_bytes.bit_length()
        known_s = self._slow_s.get(size)
        if known_s is not None:
            return known_s
        smaller = [slow_s * 2.0 ** (size - other) for other, slow_s in self._slow_s.items() if other < size]
        return max(smaller) if smaller else min(self._slow_s.values())


class StreamTiming:
    """How one Deployment streams, as one proxy sees it.

    The slow end of a share of a hundredth is followed without keeping samples: what is slower counts at once, what is
    quicker lets it fade. Cost: 0.2 µs a stream.
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
        """An answer that was not streamed ended as it should. Units: seconds per token, its prompt's share included."""
        self._wholes += 1
        self._whole_token_s = max(token_s, DECAY * self._whole_token_s)

    @property
    def token_s(self) -> float | None:
        """The slow end of a token's time in a whole answer, None while too little was seen."""
        if self._wholes >= STREAMS_MIN:
            return self._whole_token_s
        return self._tpot_s if self._streams >= STREAMS_MIN else None

    def record_stream(self, tpot_s: float) -> None:
        """A stream ended as it should. Units: seconds per token over its whole length."""
        self._streams += 1
        self._tpot_s = max(tpot_s, DECAY * self._tpot_s)
        self._gap_s *= DECAY

    def record_gap(self, silent_s: float) -> None:
        """A stream was silent so long, and then went on."""
        self._gap_s = max(self._gap_s, silent_s)

    @property
    def stall_s(self) -> float:
        """How long a stream of it may be silent."""
        if self._streams < STREAMS_MIN:
            return max(STALL_UNKNOWN_S, self._longest_s)
        return self._longest_s

    @property
    def _longest_s(self) -> float:
        longest_s = max(STALL_TOKENS * self._tpot_s, STALL_GAPS * self._gap_s)
        return min(STALL_MAX_S, max(STALL_MIN_S, longest_s))
