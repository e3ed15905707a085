"""Which notes of judgements are worth a line: a policy that fails, fails for every request alike."""

from collections.abc import Iterable

QUIET_S = 60.0


class PolicyNotices:
    """Lets each note through once a minute.

    Notes name policies and reasons and nothing a client sent, so there are only as many as there are policies.
    """

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}

    def fresh(self, notes: Iterable[str], now_s: float) -> tuple[str, ...]:
        """Those that were not let through within the last minute."""
        found = tuple(note for note in notes if now_s - self._said_s.get(note, -QUIET_S) >= QUIET_S)
        self._said_s.update(dict.fromkeys(found, now_s))
        return found
