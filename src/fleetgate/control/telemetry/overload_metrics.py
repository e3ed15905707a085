"""What workers are short of, and how their journals stand."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fleetgate.ipc.machine_status import OverloadBits, running_workers
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell


def gauges(board: SharedMemory) -> Iterable[Metric]:
    """Whether a worker is short of something."""
    family = GaugeMetricFamily("fleetgate_short", "1 while a worker is short of it.", labels=["worker", "what"])
    for worker in running_workers(board):
        short = OverloadBits(board.get(worker, WorkerCell.SHORT))
        for each in OverloadBits:
            family.add_metric([str(worker), str(each.name).lower()], int(each in short))
        family.add_metric([str(worker), "journal"], board.get(worker, WorkerCell.JOURNAL_SHORT))
    yield family


def usage_gauges(board: SharedMemory, journal: Path) -> Iterable[Metric]:
    """Attempts without a row, and what of the journals lies on the disk."""
    lost = sum(board.get(worker, WorkerCell.ROWS_LOST) for worker in range(board.workers))
    yield CounterMetricFamily(
        "fleetgate_journal_rows_lost", "Journal rows that found no room, neither on the disk nor in memory.", value=lost
    )
    size_bytes = 0
    with suppress(OSError):  # a file may be taken in meanwhile
        size_bytes = sum(path.stat().st_size for path in journal.iterdir())
    yield GaugeMetricFamily(
        "fleetgate_journal_bytes",
        "Journals on the disk: 4 to 8 MiB a worker; more waits to be taken in.",
        value=size_bytes,
    )
