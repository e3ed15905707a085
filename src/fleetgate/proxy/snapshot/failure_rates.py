"""How requests ended, per worker, read off the metric cells that are kept anyway: nothing is added to a request."""

import re
from collections.abc import Collection

from fleetgate.core.canary_analysis import AttemptCounts
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.telemetry.metrics import series_name

_ENDED = re.compile(r'fleetgate_requests_total\{gateway="((?:[^"\\]|\\.)*)",.*outcome="(\w+)"\}')
_UNAVAILABLE = re.compile(r'fleetgate_unavailable_total\{gateway="((?:[^"\\]|\\.)*)"\}')
_DENIED = re.compile(r'fleetgate_denied_total\{status="5')
_FAILURES = ("failed", "interrupted")
ANY = ""  # not a Gateway's name: what counts for all


class FailureRateReader:
    """Counts of all workers by Gateway. Cost: 1 µs a cell, and a pass over the names when there are new ones."""

    def __init__(self, board: SharedMemory) -> None:
        self._board = board
        self._known: list[int] = [-1] * board.workers
        self._ended: list[list[tuple[str, int]]] = [[] for _ in range(board.workers)]
        self._failed: list[list[tuple[str, int]]] = [[] for _ in range(board.workers)]

    def of(self, worker: int, gateways: Collection[str]) -> AttemptCounts:
        """What one worker has counted for some Gateways since it was first started."""
        self._learn_names(worker)
        cells, names = self._board.series, {*(_as_label(name) for name in gateways), ANY}
        return AttemptCounts(
            sum(cells[index] for gateway, index in self._ended[worker] if gateway in names),
            sum(cells[index] for gateway, index in self._failed[worker] if gateway in names),
        )

    def of_others(self, worker: int, gateways: Collection[str]) -> AttemptCounts:
        """What all the others have counted."""
        found = [self.of(other, gateways) for other in range(self._board.workers) if other != worker]
        return AttemptCounts(sum(one.ended for one in found), sum(one.failed for one in found))

    def _learn_names(self, worker: int) -> None:
        count = self._board.get(worker, WorkerCell.SERIES_COUNT)
        if count == self._known[worker]:
            return
        self._known[worker] = count
        ended, failed = self._ended[worker], self._failed[worker]
        ended.clear()
        failed.clear()
        for name, index in self._board.series_of(worker):
            if match := _ENDED.fullmatch(name):
                ended.append((match[1], index))
                if match[2] in _FAILURES:
                    failed.append((match[1], index))
            elif match := _UNAVAILABLE.fullmatch(name):  # such a request ended as `refused`
                failed.append((match[1], index))
            elif _DENIED.match(name):
                ended.append((ANY, index))
                failed.append((ANY, index))


def _as_label(gateway: str) -> str:
    return series_name("", {"": gateway})[3:-2]
