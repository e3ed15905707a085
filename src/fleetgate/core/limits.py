"""Budgets that keep a fault from multiplying traffic."""

RETRY_FLOOR_PER_S = 10.0  # a quiet Gateway must still be able to fail over
RETRY_BURST_S = 10.0  # how much of the past counts as "recent requests"


class RetryBudget:
    """Further attempts as a share of recent requests, never less than ten a second.

    Units: `ratio` attempts per request. Source: the retry budgets of Google's SRE book, with a floor.
    """

    __slots__ = ("_at_s", "_ratio", "_tokens")

    def __init__(self, ratio: float, now_s: float) -> None:
        self._ratio = ratio
        self._tokens = RETRY_FLOOR_PER_S
        self._at_s = now_s

    def request(self) -> None:
        """A request came: it adds its share."""
        self._tokens = min(self._tokens + self._ratio, self._most())

    def take(self, now_s: float) -> bool:
        """Spend one further attempt, or be told that the budget is gone."""
        self._tokens = min(self._tokens + (now_s - self._at_s) * RETRY_FLOOR_PER_S, self._most())
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _most(self) -> float:
        return RETRY_FLOOR_PER_S * RETRY_BURST_S
