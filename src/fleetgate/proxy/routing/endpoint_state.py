"""The state of an Endpoint in one worker: health, requests in flight and connections."""

from fleetgate.core.capacity.units import SLOW_START_MIN, slow_start
from fleetgate.core.health.circuit_breaker import (
    HEALTHY,
    BreakerState,
    EndpointHealth,
    Signal,
    current_state,
    health_from_ejection,
    next_health,
)
from fleetgate.core.health.outlier_detection import LatencyOutlier
from fleetgate.core.model import Endpoint
from fleetgate.proxy.transport.connection_pool import ConnectionPool

PACE_OBSERVED_S_MIN = 0.2  # of a stream that began since the last tick


class EndpointState:
    """An Endpoint's circuit breaker, trials, latency outliers and connection pool."""

    def __init__(self, spec: Endpoint, pool: ConnectionPool) -> None:
        self.spec = spec
        self.pool = pool
        self.health: EndpointHealth = HEALTHY
        self.in_flight = 0
        self.trials = 0  # half open: requests in flight without content yet
        self.trial_s = float("-inf")  # when the last of them was sent
        self.trials_passed = 0  # half open: the number of trials that brought content
        self.probe_seen_ms = 0
        self.published = 0  # the last ejection that was published to other workers, or adopted from one
        self.lost_s = float("-inf")  # when an attempt was last lost here before its first content
        self.panicked_s = float("-inf")  # when it was last picked although every Endpoint was ejected
        # By 0 for the time between tokens, else by the request's size in bits for the time to the first token.
        self.slowness: dict[int, LatencyOutlier] = {}

    def fitness(self, now_s: float) -> float:
        """The share of its load that it may take, 0 to 1: slow start if closed, one trial at a time if half open.

        Each trial that brings content permits one more at a time, so that an Endpoint that responds is not limited
        to the rate of its first tokens while its capacity is needed.
        """
        match current_state(self.health, now_s):
            case BreakerState.CLOSED:
                return slow_start(now_s - self.health.recovered_at_s)
            case BreakerState.HALF_OPEN:
                return SLOW_START_MIN if self.trials <= self.trials_passed else 0.0
            case _:
                return 0.0

    def record(self, signal: Signal, now_s: float, entropy: float) -> bool:
        """Feed the circuit breaker; True if its state changed."""
        before = self.health
        self.health = next_health(before, signal, now_s, entropy)
        if self.health.breaker is before.breaker:
            return False
        self.trials_passed = 0
        return True

    def note_published(self, ejection: int) -> None:
        """Note that this worker has published an ejection."""
        self.published = max(self.published, ejection)

    def adopt_ejection(self, ejection: int) -> bool:
        """Adopt an ejection by another worker. Returns False if its breaker is not closed here."""
        if self.health.breaker is not BreakerState.CLOSED:
            return False
        self.published = ejection
        self.health = health_from_ejection(ejection)
        return True

    def note_panic(self, now_s: float) -> None:
        """Note that it is picked although every Endpoint is ejected."""
        self.panicked_s = now_s

    def note_loss(self, now_s: float) -> float:
        """Note that an attempt was lost before its first content. Returns the time since the last such loss."""
        age_s, self.lost_s = now_s - self.lost_s, now_s
        return age_s

    def note_probe(self, seen_ms: int) -> bool:
        """Note a probe's result. Returns False if it was noted before."""
        if seen_ms <= self.probe_seen_ms:
            return False
        self.probe_seen_ms = seen_ms
        return True

    def begin_trial(self, now_s: float) -> None:
        """Half open: count a request that tries whether it is healthy again."""
        self.trials += 1
        self.trial_s = now_s

    def end_trial(self, has_content: bool) -> None:
        """Half open: count a trial that brought content, or that ended without any."""
        self.trials -= 1
        self.trials_passed += has_content

    def record_ttft(self, body_bytes: int, ttft_s: float) -> None:
        """Record the time to the first token of a request of this size."""
        self.slowness_of(body_bytes.bit_length()).record(ttft_s)

    def record_pace(self, passed_s: float, tokens: int) -> None:
        """Record the tokens of a stream since the last tick, unless the time is too short for a rate."""
        if passed_s > PACE_OBSERVED_S_MIN:
            self.slowness_of(0).record(passed_s / max(1, tokens))

    def is_slow(self) -> bool:
        """Whether its latencies since the last call are outliers of its own history. Evaluates every detector."""
        return any([outlier.evaluate(self.in_flight) for outlier in self.slowness.values()])

    def slowness_of(self, size: int) -> LatencyOutlier:
        """The outlier detector of the time between tokens (0), or of first tokens of requests of `size` bits."""
        return self.slowness.get(size) or self.slowness.setdefault(size, LatencyOutlier())
