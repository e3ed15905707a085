"""Hedging: a request is sent a second time if the first attempt is slow, rarely, late and only with spare capacity.

Source: Dean and Barroso, "The tail at scale" (hedged requests).
"""

from collections.abc import Iterable

from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.routing.strategies import CandidateState

SLOW_QUANTILE = 0.95  # of requests of about this size; a request that takes longer is slow
SEEN_MIN = 20  # first tokens before any request counts as slow
SEEN_MAX = 1000  # then all counts are halved, so that the table follows the engines
UTILISATION_MAX = 0.6  # of the sum of limits; above it a second copy would take the capacity of another request
FIRST_BIT, LAST_BIT = 10, 28  # cells end at powers of two microseconds: 1 ms to 268 s
CELLS = LAST_BIT - FIRST_BIT + 1


class HedgeThreshold:
    """How long first tokens took, by the size of the prompt in powers of two. Cost: 0.5 µs for each one recorded."""

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[int, list[int]] = {}

    def record(self, prompt_tokens: float, ttft_s: float) -> None:
        """A first token came."""
        cells = self._cells.setdefault(int(prompt_tokens).bit_length(), [0] * CELLS)
        cells[min(max(int(ttft_s * 1e6).bit_length(), FIRST_BIT), LAST_BIT) - FIRST_BIT] += 1
        if sum(cells) > SEEN_MAX:
            cells[:] = [count // 2 for count in cells]

    def threshold_s(self, prompt_tokens: float) -> float:
        """The time that one in twenty requests of this size exceeds; infinite while too few were seen."""
        cells = self._cells.get(int(prompt_tokens).bit_length(), ())
        total = sum(cells)
        if total < SEEN_MIN:
            return float("inf")
        below = 0
        for cell, count in enumerate(cells):
            below += count
            if below >= SLOW_QUANTILE * total:
                return (1 << (cell + FIRST_BIT)) / 1e6  # the cell's upper end: too late rather than too early
        return float("inf")


def may_hedge(mode: str, priority: int) -> bool:
    """Whether requests of this priority are hedged. Shape: `mode` is off, critical or all."""
    return mode == "all" or (mode == "critical" and priority == Priority.CRITICAL)


def has_spare_capacity(states: Iterable[CandidateState]) -> bool:
    """Whether so much is free that a copy takes no other request's capacity.

    Deployments without a limit are not counted. A paused Deployment means that there is no spare capacity.
    """
    healthy = [state for state in states if state.health > 0.0]
    if any(state.paused for state in healthy):
        return False
    limited = [state for state in healthy if state.limit]
    limit = sum(state.limit for state in limited)
    return bool(limit) and sum(state.in_flight for state in limited) < UTILISATION_MAX * limit
