"""One Endpoint as this worker knows it: its health, its requests in flight and its connections."""

from fleetgate.core.capacity.units import SLOW_START_MIN, slow_start
from fleetgate.core.health.circuit_breaker import HEALTHY, BreakerState, EndpointHealth, Signal, current_state, next_health
from fleetgate.core.health.outlier_detection import LatencyOutlier
from fleetgate.core.model import Endpoint
from fleetgate.proxy.transport.connection_pool import ConnectionPool


class EndpointState:
    """An Endpoint's circuit breaker, trials, latency outliers and connection pool."""

    def __init__(self, endpoint: Endpoint, pool: ConnectionPool) -> None:
        self.endpoint = endpoint
        self.pool = pool
        self.health: EndpointHealth = HEALTHY
        self.in_flight = 0
        self.trials = 0  # half open: requests under way that have brought no content yet
        self.trial_s = float("-inf")  # when the last of them was sent
        self.shown = 0  # half open: how many have brought content
        self.probe_seen_ms = 0
        self.adopted = 0  # the last ejection taken over from another worker, or published to the others
        self.lost_s = float("-inf")  # when an attempt was last lost here before its first content
        self.panicked_s = float("-inf")  # when it was last picked although every Endpoint was ejected
        # By 0 for the time between tokens, else by the request's size in bits for the time to the first token.
        self.slowness: dict[int, LatencyOutlier] = {}

    def fitness(self, now_s: float) -> float:
        """The share of its load that it may take, 0 to 1: slow start if closed, one trial at a time if half open.

        Each trial that brings content permits one more at a time, so that an Endpoint that answers is not limited to
        the rate of its first tokens while its capacity is needed.
        """
        match current_state(self.health, now_s):
            case BreakerState.CLOSED:
                return slow_start(now_s - self.health.recovered_at_s)
            case BreakerState.HALF_OPEN:
                return SLOW_START_MIN if self.trials <= self.shown else 0.0
            case _:
                return 0.0

    def record(self, signal: Signal, now_s: float, entropy: float) -> bool:
        """Feed the circuit breaker; True if its state changed."""
        before = self.health
        self.health = next_health(before, signal, now_s, entropy)
        if self.health.breaker is before.breaker:
            return False
        self.shown = 0
        return True

    def slowness_of(self, size: int) -> LatencyOutlier:
        """The outlier detector of the time between tokens (0), or of first tokens of requests of `size` bits."""
        return self.slowness.get(size) or self.slowness.setdefault(size, LatencyOutlier())
