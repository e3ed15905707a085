"""When a request is sent a second time because the first is slow: rarely, late, and only while there is room to spare.

Source: Dean and Barroso, "The tail at scale" (hedged requests); ALGORITHMS.md section 8.4.
"""

from collections.abc import Iterable

from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.routing.strategies import CandidateState

SLOW_QUANTILE = 0.95  # of requests of about this size: whoever takes longer is slow
SEEN_MIN = 20  # first tokens before anything is called slow
SEEN_MAX = 1000  # beyond it what was seen counts half, so that the table follows the engines
UTILISATION_MAX = 0.6  # of all places: past it a second copy would take somebody's room
FIRST_BIT, LAST_BIT = 10, 28  # cells end at powers of two microseconds: 1 ms to 268 s
CELLS = LAST_BIT - FIRST_BIT + 1


class HedgeThreshold:
    """How long first tokens took, by the size of the prompt in powers of two. Cost: 0.5 µs for each one seen."""

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[int, list[int]] = {}

    def record(self, prompt_tokens: float, ttft_s: float) -> None:
        """One first token."""
        cells = self._cells.setdefault(int(prompt_tokens).bit_length(), [0] * CELLS)
        cells[min(max(int(ttft_s * 1e6).bit_length(), FIRST_BIT), LAST_BIT) - FIRST_BIT] += 1
        if sum(cells) > SEEN_MAX:
            cells[:] = [count // 2 for count in cells]

    def threshold_s(self, prompt_tokens: float) -> float:
        """What only one in twenty requests of this size takes longer than; infinite while too few were seen."""
        cells = self._cells.get(int(prompt_tokens).bit_length(), ())
        total = sum(cells)
        if total < SEEN_MIN:
            return float("inf")
        below = 0
        for cell, count in enumerate(cells):
            below += count
            if below >= SLOW_QUANTILE * total:
                return (1 << (cell + FIRST_BIT)) / 1e6  # the cell's upper end: rather too late than too early
        return float("inf")


def may_hedge(mode: str, priority: int) -> bool:
    """Whether requests of this priority are hedged at all. Shape: `mode` is off, critical or all."""
    return mode == "all" or (mode == "critical" and priority == Priority.CRITICAL)


def has_spare_capacity(standings: Iterable[CandidateState]) -> bool:
    """Whether so much is free that a copy takes nobody's place. A Deployment without a limit tells nothing."""
    healthy = [standing for standing in standings if standing.health > 0.0]
    if any(standing.paused for standing in healthy):
        return False
    limited = [standing for standing in healthy if standing.limit]
    places = sum(standing.limit for standing in limited)
    return bool(places) and sum(standing.in_flight for standing in limited) < UTILISATION_MAX * places
