"""Budgets that keep a fault from multiplying traffic."""

RETRY_FLOOR_PER_S = 10.0  # a quiet Gateway must still be able to fail over
TOKENS_MAX = RETRY_FLOOR_PER_S * 10.0  # what a quiet spell may save up: ten seconds' worth


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
        tokens = self._tokens + self._ratio
        self._tokens = tokens if tokens < TOKENS_MAX else TOKENS_MAX

    def take(self, now_s: float) -> bool:
        """Spend one further attempt, or be told that the budget is gone."""
        self._tokens = min(self._tokens + (now_s - self._at_s) * RETRY_FLOOR_PER_S, TOKENS_MAX)
        self._at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
