"""The board: one block of shared memory on which the processes of a machine write what the others must see.

Every cell is a signed 64-bit integer with exactly one writer, so no lock is needed to read it. A worker writes its own
column; the worker that holds the prober's lock writes the signals; the supervisor clears the column of a dead worker.
The module is pure: the shell opens the memory and hands it in.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

from fleetgate.core.admission.work_ledger import WORK_CELLS, WorkCell
from fleetgate.core.model import DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX

WORKERS_MAX = 64
COLUMNS_MAX = 2 * WORKERS_MAX  # workers that are replaced hold theirs until their last answer has ended
SERIES_MAX = 4096  # counters and histogram cells of one worker; more label sets fall into `other`
SERIES_NAMES_BYTES = 512 * 1024


class WorkerCell(IntEnum):
    """The cells a worker keeps about itself."""

    PID = 0
    HEARTBEAT_MS = 1
    SNAPSHOT_VERSION = 2
    ACCEPTING = 3
    CONNECTIONS = 4
    WAITING = 5
    SNAPSHOT_AT_MS = 6
    SERIES_COUNT = 7
    NAMES_BYTES = 8
    STARTS = 9
    DUTY = 10  # written by the supervisor: whether a process runs in this column, or is about to
    SHARES = 11  # this worker counts with every column, not only with those of its own generation
    LAG_MS = 13  # the last time its loop stood still: for how long, and when
    LAG_AT_MS = 14
    SHORT = 15  # bits: memory, connections, bodies
    SNAPSHOT_TRYING = 16  # the version on trial here; it outlives the worker, so that one that kills workers is known
    SNAPSHOT_PROVEN = 17  # the version that others may follow to
    SNAPSHOT_RETURNED = 18  # the version that was given up for the last good one, 0 for none
    JOURNAL_SHORT = 19  # accounts wait in memory, because the disk does not take them
    ROWS_LOST = 20  # accounts that found no room there either


WORKER_CELLS = 24


class ControlPlaneCell(IntEnum):
    """What is known of the control plane, kept by whoever speaks for it on this machine."""

    HEARTBEAT_MS = 0
    CONFIGURED = 1  # the file that `up` was given is applied; from then on what the store has goes before it


PLANE_CELLS = 4
_OF_THE_LIVING = (
    WorkerCell.PID,
    WorkerCell.ACCEPTING,
    WorkerCell.CONNECTIONS,
    WorkerCell.WAITING,
    WorkerCell.SNAPSHOT_VERSION,
    WorkerCell.DUTY,
    WorkerCell.SHARES,
)


class EndpointSignal(IntEnum):
    """The cells the prober keeps about one Endpoint. `SEEN_MS` 0 means never probed."""

    UP = 0
    SEEN_MS = 1
    RUNNING = 2
    WAITING = 3
    KV_PERMILLE = 4
    LOAD_SEEN_MS = 5
    RTT_US = 6
    FOREIGN = 7  # requests at the engine that did not come through here
    PREFILL = 8  # 1 where it was seen to go on with what another had begun, 2 where it does not, 0 not known
    TOKENS = 9  # whose token ids it was seen to give and take: a mark that others with the same have too; 1 none


SIGNAL_CELLS = 10


class DeploymentCounter(IntEnum):
    """What a worker counts of a Deployment for the correction of its limit; they only rise."""

    ENDED = 0
    TTFT_LATE = 1
    TPOT_LATE = 2
    REFUSED = 3  # by the engine: 429, 503 with an overflowing queue, 529


TALLY_CELLS = 4


class LearnedCell(IntEnum):
    """What the prober's worker has learned of a Deployment for all workers. 0 in `SEEN_MS` means nothing yet."""

    SEEN_MS = 0
    LIMIT = 1  # requests; 0 for none
    MARGIN_PERMILLE = 2
    MILLIUNITS = 3
    OF = 4  # a mark of what it was learned of: a Deployment that was changed starts anew


LEARNED_CELLS = 5


def layout() -> str:
    """A mark of how this version lays the block out: only processes with the same one may share a block."""
    enums = (WorkerCell, EndpointSignal, WorkCell, DeploymentCounter, LearnedCell)
    members = [[(cell.name, int(cell)) for cell in enum] for enum in enums]
    sizes = (WORKER_CELLS, SIGNAL_CELLS, WORK_CELLS, TALLY_CELLS, LEARNED_CELLS, SERIES_MAX, SERIES_NAMES_BYTES)
    of_model = (DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX, SharedMemory.bytes_needed(1))
    return f"{crc32(repr((members, sizes, of_model)).encode()):08x}"


class LearnedLimits(NamedTuple):
    """What was learned of a Deployment. Units: `limit` in requests, 0 for none; `milliunits` CU × 1,000."""

    limit: int
    margin_permille: int
    milliunits: int


class SharedMemory:
    """Views on the shared block.

    Shape: `workers` is the number of columns, twice that of the workers where they can be replaced while they run;
    `buffer` is at least `Board.bytes_needed(workers)` long and zeroed at first use; all times are milliseconds of the
    machine's monotonic clock, which its processes share.
    """

    def __init__(self, buffer: memoryview, workers: int) -> None:
        if not 1 <= workers <= COLUMNS_MAX:
            raise ValueError(f"workers must be 1 to {COLUMNS_MAX}, not {workers}")
        self.workers = workers
        self._bytes = buffer.cast("B")
        cells = self._bytes[: self._cell_count(workers) * 8].cast("q")
        names_at = self._cell_count(workers) * 8
        self._names = self._bytes[names_at : names_at + workers * SERIES_NAMES_BYTES]
        at = 0
        self.worker_cells = cells[at : (at := at + workers * WORKER_CELLS)]
        self.in_flight = cells[at : (at := at + DEPLOYMENTS_MAX * workers)]  # [slot][worker]
        self.ejected_until_ms = cells[at : (at := at + ENDPOINTS_MAX * workers)]  # [slot][worker]: `health.told_ms`
        self.retry_after_until_ms = cells[at : (at := at + DEPLOYMENTS_MAX * workers)]  # [slot][worker]
        self.waiting = cells[at : (at := at + GATEWAYS_MAX * workers)]  # [slot][worker]
        self.milliunits = cells[at : (at := at + DEPLOYMENTS_MAX * workers)]  # [slot][worker]: CU in flight, × 1,000
        self.work = cells[at : (at := at + ENDPOINTS_MAX * workers * WORK_CELLS)]  # [slot][worker][Work]
        self.deployment_counters = cells[
            at : (at := at + DEPLOYMENTS_MAX * workers * TALLY_CELLS)
        ]  # [slot][worker][Tally]
        self.learned = cells[at : (at := at + DEPLOYMENTS_MAX * LEARNED_CELLS)]  # [slot][Learned]
        self.signals = cells[at : (at := at + ENDPOINTS_MAX * SIGNAL_CELLS)]
        self.control_plane = cells[at : (at := at + PLANE_CELLS)]  # [Plane]
        self.series = cells[at : at + workers * SERIES_MAX]

    @staticmethod
    def _cell_count(workers: int) -> int:
        deployment_cells = 3 + TALLY_CELLS
        endpoint_cells = 1 + WORK_CELLS
        per_worker = (
            WORKER_CELLS
            + DEPLOYMENTS_MAX * deployment_cells
            + ENDPOINTS_MAX * endpoint_cells
            + GATEWAYS_MAX
            + SERIES_MAX
        )
        return workers * per_worker + ENDPOINTS_MAX * SIGNAL_CELLS + DEPLOYMENTS_MAX * LEARNED_CELLS + PLANE_CELLS

    @classmethod
    def bytes_needed(cls, workers: int) -> int:
        """The size of the block for so many workers."""
        return cls._cell_count(workers) * 8 + workers * SERIES_NAMES_BYTES

    def get(self, worker: int, cell: WorkerCell) -> int:
        """One cell of a worker's own row."""
        return self.worker_cells[worker * WORKER_CELLS + cell]

    def set(self, worker: int, cell: WorkerCell, value: int) -> None:
        """Write one cell of a worker's own row; only that worker (or, when it is dead, the supervisor) may."""
        self.worker_cells[worker * WORKER_CELLS + cell] = value

    def present(self) -> list[int]:
        """The columns that a worker runs in, or is to run in again."""
        return [
            worker
            for worker in range(self.workers)
            if self.get(worker, WorkerCell.STARTS) or self.get(worker, WorkerCell.PID)
        ]

    def signal(self, endpoint_slot: int, cell: EndpointSignal) -> int:
        """One cell of what the prober knows about an Endpoint."""
        return self.signals[endpoint_slot * SIGNAL_CELLS + cell]

    def set_signal(self, endpoint_slot: int, cell: EndpointSignal, value: int) -> None:
        """Write one cell about an Endpoint; only the prober may."""
        self.signals[endpoint_slot * SIGNAL_CELLS + cell] = value

    def in_flight_total(self, slot: int) -> int:
        """Requests in flight to a Deployment over all workers."""
        at = slot * self.workers
        return sum(self.in_flight[at : at + self.workers])

    def waiting_total(self, gateway_slot: int) -> int:
        """Requests that wait for room in a Gateway over all workers."""
        at = gateway_slot * self.workers
        return sum(self.waiting[at : at + self.workers])

    def milliunits_total(self, slot: int) -> int:
        """CU in flight to a Deployment over all workers, × 1,000."""
        at = slot * self.workers
        return sum(self.milliunits[at : at + self.workers])

    def work_total(self, endpoint_slot: int, cell: WorkCell) -> int:
        """One measure of the token work at an Endpoint over all workers."""
        at = endpoint_slot * self.workers * WORK_CELLS
        return sum(self.work[at : at + self.workers * WORK_CELLS][cell::WORK_CELLS])

    def learned_limits(self, slot: int) -> LearnedLimits | None:
        """What was learned of a Deployment, None before the first look."""
        at = slot * LEARNED_CELLS
        seen_ms, limit, margin_permille, milliunits, _ = self.learned[at : at + LEARNED_CELLS]
        return LearnedLimits(limit, margin_permille, milliunits) if seen_ms else None

    def ejected_until(self, endpoint_slot: int) -> int:
        """What the worker told that keeps an Endpoint out for longest, in `health.told_ms`; 0 if none does."""
        at = endpoint_slot * self.workers
        return max(self.ejected_until_ms[at : at + self.workers])

    def retry_after_until(self, slot: int) -> int:
        """Until when the engine of a Deployment has asked any worker to be left alone, ms; 0 if it has not."""
        at = slot * self.workers
        return max(self.retry_after_until_ms[at : at + self.workers])

    def clear_worker(self, worker: int) -> int:
        """Give back what a dead worker held, and say how many requests that were. Its counters stay."""
        swept = 0
        for slot in range(DEPLOYMENTS_MAX):
            at = slot * self.workers + worker
            swept += self.in_flight[at]
            self.in_flight[at] = self.milliunits[at] = self.retry_after_until_ms[at] = 0
        for slot in range(GATEWAYS_MAX):
            self.waiting[slot * self.workers + worker] = 0
        for slot in range(ENDPOINTS_MAX):
            at = slot * self.workers + worker
            self.ejected_until_ms[at] = 0
            for kept in (WorkCell.PENDING_TOKENS, WorkCell.SEQUENCES, WorkCell.KV_TOKENS):
                self.work[at * WORK_CELLS + kept] = 0
        for cell in _OF_THE_LIVING:
            self.set(worker, cell, 0)
        return swept

    def add_series(self, worker: int, name: str) -> int:
        """Give a named series its cell in this worker's column and return the index into `series`, -1 if full.

        Shape: `name` is the exposition name with its labels, `fleetgate_requests_total{gateway="chat",...}`.
        """
        count, used = self.get(worker, WorkerCell.SERIES_COUNT), self.get(worker, WorkerCell.NAMES_BYTES)
        line = name.encode() + b"\n"
        if count >= SERIES_MAX or used + len(line) > SERIES_NAMES_BYTES:
            return -1
        at = worker * SERIES_NAMES_BYTES + used
        self._names[at : at + len(line)] = line
        self.set(worker, WorkerCell.NAMES_BYTES, used + len(line))
        self.set(
            worker, WorkerCell.SERIES_COUNT, count + 1
        )  # last, so that a reader never sees a cell without its name
        return worker * SERIES_MAX + count

    def series_of(self, worker: int) -> Iterator[tuple[str, int]]:
        """The named series of one worker with the index of each in `series`."""
        count, used = self.get(worker, WorkerCell.SERIES_COUNT), self.get(worker, WorkerCell.NAMES_BYTES)
        at = worker * SERIES_NAMES_BYTES
        names = bytes(self._names[at : at + used]).decode().splitlines()
        for index, name in enumerate(names[:count]):
            yield name, worker * SERIES_MAX + index

    def series_totals(self) -> dict[str, int]:
        """Every series summed over the workers."""
        totals: dict[str, int] = {}
        for worker in range(self.workers):
            for name, index in self.series_of(worker):
                totals[name] = totals.get(name, 0) + self.series[index]
        return totals
