"""Metrics of what workers are short of, and of the usage journals."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fleetgate.ipc.exposition import Family
from fleetgate.ipc.machine_status import OverloadBits, running_workers
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell


def shortage_metrics(shared_memory: SharedMemory) -> Family:
    """Whether a worker is short of memory, connections, room for bodies or a disk that takes its journal."""
    family = Family("fleetgate_short")
    for worker in running_workers(shared_memory):
        short = OverloadBits(shared_memory.get(worker, WorkerCell.SHORT))
        for each in OverloadBits:
            family.add((str(worker), str(each.name).lower()), int(each in short))
        family.add((str(worker), "journal"), shared_memory.get(worker, WorkerCell.JOURNAL_SHORT))
    return family


def journal_metrics(shared_memory: SharedMemory, journal: Path) -> Iterator[Family]:
    """Lost rows, and the size of the journals on disk."""
    lost = sum(shared_memory.get(worker, WorkerCell.ROWS_LOST) for worker in range(shared_memory.workers))
    yield Family("fleetgate_journal_rows_lost_total").add((), lost)
    size_bytes = 0
    with suppress(OSError):  # a file that was just ingested is gone
        size_bytes = sum(path.stat().st_size for path in journal.iterdir())
    yield Family("fleetgate_journal_bytes").add((), size_bytes)
