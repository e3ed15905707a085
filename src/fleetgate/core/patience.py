"""How long a Deployment may be silent before it counts as lost: by what it promised, and by how it streams.

Source: FAULTS.md rows 6 and 8.
"""

FIRST_MIN_S, FIRST_MAX_S = 5.0, 300.0
FIRST_FACTOR = 3.0  # times what was predicted
FIRST_UNKNOWN_S = 60.0  # where no Profile predicts
STALL_MIN_S, STALL_MAX_S = 5.0, 60.0
STALL_UNKNOWN_S = 15.0  # before a Deployment has been seen to stream
STALL_TOKENS = 20.0  # times the slow end of its time per token
STALL_GAPS = 2.0  # times the longest silence that it came back from
SEEN_MIN = 20  # streams
FADES_TO = 0.99  # a slow end is forgotten by so much with each stream that was quicker


def first_event_s(predicted_s: float | None) -> float:
    """How long the first event of a stream may take, None where nothing is predicted."""
    if predicted_s is None:
        return FIRST_UNKNOWN_S
    return min(FIRST_MAX_S, max(FIRST_MIN_S, FIRST_FACTOR * predicted_s))


class Pulse:
    """How one Deployment streams, as one proxy sees it.

    The slow end of a share of a hundredth is followed without keeping samples: what is slower counts at once, what is
    quicker lets it fade. Cost: 0.2 µs a stream.
    """

    __slots__ = ("_gap_s", "_streams", "_tpot_s")

    def __init__(self) -> None:
        self._tpot_s = 0.0
        self._gap_s = 0.0
        self._streams = 0

    def saw_stream(self, tpot_s: float) -> None:
        """A stream ended as it should. Units: seconds per token over its whole length."""
        self._streams += 1
        self._tpot_s = max(tpot_s, FADES_TO * self._tpot_s)
        self._gap_s *= FADES_TO

    def saw_gap(self, silent_s: float) -> None:
        """A stream was silent so long, and then went on."""
        self._gap_s = max(self._gap_s, silent_s)

    @property
    def stall_s(self) -> float:
        """How long a stream of it may be silent."""
        if self._streams < SEEN_MIN:
            return max(STALL_UNKNOWN_S, self._longest_s)
        return self._longest_s

    @property
    def _longest_s(self) -> float:
        longest_s = max(STALL_TOKENS * self._tpot_s, STALL_GAPS * self._gap_s)
        return min(STALL_MAX_S, max(STALL_MIN_S, longest_s))
