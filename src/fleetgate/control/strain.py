"""What workers are short of, as a gauge."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from fleetgate.core.board import Board, Worker
from fleetgate.core.shortage import Shortage
from fleetgate.core.standing import running


def gauges(board: Board) -> Iterable[Metric]:
    """Whether a worker is short of something."""
    family = GaugeMetricFamily("fleetgate_short", "1 while a worker is short of it.", labels=["worker", "what"])
    for worker in running(board):
        short = Shortage(board.get(worker, Worker.SHORT))
        for each in Shortage:
            family.add_metric([str(worker), str(each.name).lower()], int(each in short))
    yield family
