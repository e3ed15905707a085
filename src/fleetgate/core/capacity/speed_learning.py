"""How fast a Deployment's engines are now, learned from client traffic; an idle Deployment teaches nothing."""

from fleetgate.core.capacity.latency_model import SpeedFactor

FACTOR_MIN, FACTOR_MAX = 0.1, 10.0
FACTOR_SHARE = 0.2  # weight of one observation: a lasting slow-down is followed after about five
PREFILL_MIN_S = 0.02  # shorter prefills are lost in the noise of the network and of single steps


class SpeedLearner:
    """How much slower or faster than its Profile a Deployment is, from its own streams."""

    __slots__ = ("factor",)

    def __init__(self, factor: SpeedFactor) -> None:
        self.factor = factor

    def record_first_token(self, predicted_s: float, observed_s: float, prefill_s: float) -> None:
        """A first token came. Units: `prefill_s` is the part of the prediction for prompts, at the current factor."""
        if prefill_s < PREFILL_MIN_S or prefill_s < 0.25 * predicted_s:
            return
        ratio = max(0.25, (observed_s - (predicted_s - prefill_s)) / prefill_s)
        share = FACTOR_SHARE * min(1.0, prefill_s / 0.2)  # a long prefill is more precise than a short one
        prefill = self.factor.prefill * min(4.0, ratio) ** share
        self.factor = SpeedFactor(min(FACTOR_MAX, max(FACTOR_MIN, prefill)), self.factor.decode)

    def record_decode(self, decode_s: float, step_s: float, steps: int) -> None:
        """Streams decoded for a while. Units: seconds left for decoding, the Profile's step, and the steps done."""
        if steps < 5 or step_s <= 0.0:
            return
        ratio = min(FACTOR_MAX, max(FACTOR_MIN, decode_s / (steps * step_s)))
        decode = self.factor.decode * (ratio / self.factor.decode) ** FACTOR_SHARE
        self.factor = SpeedFactor(self.factor.prefill, decode)


SLOT_SHARE = 0.02  # weight of one response in the running sums: about the last fifty count
RESPONSES_MIN = 5  # with fewer, a guess is better


class ThroughputEstimate:
    """The work that one concurrent request of a Deployment gets done, by Little's law, for engines without a Profile.

    It needs no model of the engine: whatever limits the engine shows in how long its responses take.
    """

    __slots__ = ("_held_s", "_responses", "_units")

    def __init__(self) -> None:
        self._responses = 0
        self._units = 0.0
        self._held_s = 0.0

    def record_end(self, units: float, held_s: float) -> None:
        """A response ended. Units: `units` in CU by its real lengths, `held_s` from sending to the end."""
        self._responses += 1
        self._units += units - SLOT_SHARE * self._units
        self._held_s += held_s - SLOT_SHARE * self._held_s

    @property
    def units_per_s(self) -> float:
        """CU per second of one concurrent request, 0 if too few responses were seen."""
        return self._units / self._held_s if self._responses >= RESPONSES_MIN and self._held_s > 0.0 else 0.0
