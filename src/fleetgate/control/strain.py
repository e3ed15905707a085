"""What a worker suffers from while it still serves: the detail of readiness, and a gauge."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from fleetgate.core.board import Board, Worker
from fleetgate.core.shortage import Shortage

LAG_SHOWN_S = 10.0  # a scrape or a look every few seconds must not miss it
STILL_S = 1.0  # twenty sweeps
_SHORT_OF = {
    Shortage.MEMORY: "memory: part of the new requests get 503",
    Shortage.CONNECTIONS: "connections or descriptors: idle ones close, new ones may get 503",
    Shortage.BODIES: "room for request bodies: large ones may get 503",
}


def degraded(board: Board | None, now_s: float) -> list[str]:
    """What is not as it should be, in sentences; none of it takes readiness away."""
    sentences = []
    for worker in running(board):
        assert board is not None
        still_s = now_s - board.get(worker, Worker.HEARTBEAT_MS) / 1000
        if still_s > STILL_S:
            sentences.append(f"worker {worker} has not moved for {still_s:.1f} s")
        if now_s - board.get(worker, Worker.LAG_AT_MS) / 1000 < LAG_SHOWN_S:
            sentences.append(f"worker {worker} stood still for {board.get(worker, Worker.LAG_MS)} ms")
        short = Shortage(board.get(worker, Worker.SHORT))
        sentences += [f"worker {worker} is short of {what}" for each, what in _SHORT_OF.items() if each in short]
    return sentences


def gauges(board: Board) -> Iterable[Metric]:
    """Whether a worker is short of something."""
    family = GaugeMetricFamily("fleetgate_short", "1 while a worker is short of it.", labels=["worker", "what"])
    for worker in running(board):
        short = Shortage(board.get(worker, Worker.SHORT))
        for each in Shortage:
            family.add_metric([str(worker), str(each.name).lower()], int(each in short))
    yield family


def running(board: Board | None) -> list[int]:
    """The workers that there are now."""
    if board is None:
        return []
    return [worker for worker in range(board.workers) if board.get(worker, Worker.PID)]
