"""One block of shared memory, through which the processes of a machine see one another's state.

Every cell is a signed 64-bit integer with exactly one writer, so readers need no lock. A worker writes its own column;
the worker that holds the health check lock writes the signals; the supervisor clears the column of a dead worker.
This module only arranges the cells: the caller opens the memory.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

from fleetgate.core.admission.work_ledger import WORK_CELLS, WorkCell
from fleetgate.core.model import DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX

WORKERS_MAX = 64
COLUMNS_MAX = 2 * WORKERS_MAX  # during an upgrade, old workers keep their columns until their last response ends
SERIES_MAX = 4096  # counters and histogram cells of one worker; further label sets are counted as `other`
SERIES_NAMES_BYTES = 512 * 1024


class WorkerCell(IntEnum):
    """The cells of a worker's own state."""

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
    DUTY = 10  # 1 while a process runs in this column or is about to; the supervisor writes it
    SHARES = 11  # 1 if this worker counts the load of all columns, not only of its own generation's
    LAG_MS = 13  # for how long its event loop was blocked last time; `LAG_AT_MS` is when
    LAG_AT_MS = 14
    SHORT = 15  # `machine_status.OverloadBits`
    SNAPSHOT_TRYING = 16  # the version on trial; it stays when the worker dies, so that a deadly version is known
    SNAPSHOT_PROVEN = 17  # the newest version that other workers may use
    SNAPSHOT_RETURNED = 18  # the version that was rolled back to the last good one, 0 for none
    JOURNAL_SHORT = 19  # 1 while usage rows wait in memory because the disk refuses them
    ROWS_LOST = 20  # usage rows dropped because that memory was full


WORKER_CELLS = 24


class ControlPlaneCell(IntEnum):
    """The cells of the control process. The supervisor clears `CONFIGURED` before it replaces that process."""

    HEARTBEAT_MS = 0
    CONFIGURED = 1  # 1 once the file of `up --config` is applied; a restarted control process then uses the store


CONTROL_CELLS = 4
_CLEARED_AT_DEATH = (
    WorkerCell.PID,
    WorkerCell.ACCEPTING,
    WorkerCell.CONNECTIONS,
    WorkerCell.WAITING,
    WorkerCell.SNAPSHOT_VERSION,
    WorkerCell.DUTY,
    WorkerCell.SHARES,
)


class EndpointSignal(IntEnum):
    """The cells of one Endpoint's health checks. `SEEN_MS` is 0 before the first one."""

    UP = 0
    SEEN_MS = 1
    RUNNING = 2
    WAITING = 3
    KV_PERMILLE = 4
    LOAD_SEEN_MS = 5
    RTT_US = 6
    FOREIGN = 7  # requests at the engine that came from other clients than this gateway
    PREFILL = 8  # 1: it can resume a response that another began; 2: it cannot; 0: not known
    TOKENS = 9  # a checksum, equal for engines that accept one another's token ids; 1: it returns or accepts none


SIGNAL_CELLS = 10


class DeploymentCounter(IntEnum):
    """What a worker counts about a Deployment to correct its limit; the counters only rise."""

    ENDED = 0
    TTFT_LATE = 1
    TPOT_LATE = 2
    REFUSED = 3  # by the engine: 429, 503 with an overflowing queue, 529


TALLY_CELLS = 4


class LearnedCell(IntEnum):
    """What was learned about a Deployment, for all workers. `SEEN_MS` is 0 before the first correction."""

    SEEN_MS = 0
    LIMIT = 1  # requests; 0 for none
    MARGIN_PERMILLE = 2
    MILLIUNITS = 3
    OF = 4  # a checksum of the Deployment it was learned from: a changed Deployment starts anew


LEARNED_CELLS = 5


def layout() -> str:
    """Return a checksum of this version's layout. Only processes with an equal one can share a block."""
    enums = (WorkerCell, EndpointSignal, WorkCell, DeploymentCounter, LearnedCell)
    members = [[(cell.name, int(cell)) for cell in enum] for enum in enums]
    sizes = (WORKER_CELLS, SIGNAL_CELLS, WORK_CELLS, TALLY_CELLS, LEARNED_CELLS, SERIES_MAX, SERIES_NAMES_BYTES)
    of_model = (DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX, SharedMemory.bytes_needed(1))
    return f"{crc32(repr((members, sizes, of_model)).encode()):08x}"


class LearnedLimits(NamedTuple):
    """What was learned about a Deployment. Units: `limit` in requests, 0 for none; `milliunits` in CU × 1,000."""

    limit: int
    margin_permille: int
    milliunits: int


class SharedMemory:
    """Views of the shared block.

    Units: times in ms of the machine's monotonic clock, which all its processes share. Shape: `workers` is the number
    of columns, twice the number of workers if upgrades are possible; `buffer` has at least `bytes_needed(workers)`
    bytes, all 0 at first.
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
        self.ejected_until_ms = cells[
            at : (at := at + ENDPOINTS_MAX * workers)
        ]  # [slot][worker]: as the circuit breaker encodes it
        self.retry_after_until_ms = cells[at : (at := at + DEPLOYMENTS_MAX * workers)]  # [slot][worker]
        self.waiting = cells[at : (at := at + GATEWAYS_MAX * workers)]  # [slot][worker]
        self.milliunits = cells[at : (at := at + DEPLOYMENTS_MAX * workers)]  # [slot][worker]: CU in flight, × 1,000
        self.work = cells[at : (at := at + ENDPOINTS_MAX * workers * WORK_CELLS)]  # [slot][worker][WorkCell]
        # [slot][worker][DeploymentCounter]
        self.deployment_counters = cells[at : (at := at + DEPLOYMENTS_MAX * workers * TALLY_CELLS)]
        self.learned = cells[at : (at := at + DEPLOYMENTS_MAX * LEARNED_CELLS)]  # [slot][LearnedCell]
        self.signals = cells[at : (at := at + ENDPOINTS_MAX * SIGNAL_CELLS)]  # [slot][EndpointSignal]
        self.control_plane = cells[at : (at := at + CONTROL_CELLS)]  # [ControlPlaneCell]
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
        return workers * per_worker + ENDPOINTS_MAX * SIGNAL_CELLS + DEPLOYMENTS_MAX * LEARNED_CELLS + CONTROL_CELLS

    @classmethod
    def bytes_needed(cls, workers: int) -> int:
        """Return the size of the block for a number of columns."""
        return cls._cell_count(workers) * 8 + workers * SERIES_NAMES_BYTES

    def get(self, worker: int, cell: WorkerCell) -> int:
        """Return one cell of a worker's state."""
        return self.worker_cells[worker * WORKER_CELLS + cell]

    def set(self, worker: int, cell: WorkerCell, value: int) -> None:
        """Write one cell of a worker's state. Only that worker may, or the supervisor when it is dead."""
        self.worker_cells[worker * WORKER_CELLS + cell] = value

    def present(self) -> list[int]:
        """Return the columns in which a worker runs or will run again."""
        return [
            worker
            for worker in range(self.workers)
            if self.get(worker, WorkerCell.STARTS) or self.get(worker, WorkerCell.PID)
        ]

    def signal(self, endpoint_slot: int, cell: EndpointSignal) -> int:
        """Return one cell of an Endpoint's health checks."""
        return self.signals[endpoint_slot * SIGNAL_CELLS + cell]

    def set_signal(self, endpoint_slot: int, cell: EndpointSignal, value: int) -> None:
        """Write one cell of an Endpoint's health checks. Only the worker that runs them may."""
        self.signals[endpoint_slot * SIGNAL_CELLS + cell] = value

    def in_flight_total(self, slot: int) -> int:
        """Return the requests in flight to a Deployment, from all workers."""
        at = slot * self.workers
        return sum(self.in_flight[at : at + self.workers])

    def waiting_total(self, gateway_slot: int) -> int:
        """Return the requests in a Gateway's queue, in all workers."""
        at = gateway_slot * self.workers
        return sum(self.waiting[at : at + self.workers])

    def milliunits_total(self, slot: int) -> int:
        """Return the CU in flight to a Deployment from all workers, × 1,000."""
        at = slot * self.workers
        return sum(self.milliunits[at : at + self.workers])

    def work_total(self, endpoint_slot: int, cell: WorkCell) -> int:
        """Return one measure of the token work at an Endpoint, from all workers."""
        at = endpoint_slot * self.workers * WORK_CELLS
        return sum(self.work[at : at + self.workers * WORK_CELLS][cell::WORK_CELLS])

    def learned_limits(self, slot: int) -> LearnedLimits | None:
        """Return what was learned about a Deployment, None before the first correction."""
        at = slot * LEARNED_CELLS
        seen_ms, limit, margin_permille, milliunits, _ = self.learned[at : at + LEARNED_CELLS]
        return LearnedLimits(limit, margin_permille, milliunits) if seen_ms else None

    def ejected_until(self, endpoint_slot: int) -> int:
        """Return the latest end of an Endpoint's ejection in any worker, encoded by the circuit breaker; 0 for none."""
        at = endpoint_slot * self.workers
        return max(self.ejected_until_ms[at : at + self.workers])

    def retry_after_until(self, slot: int) -> int:
        """Return until when a Deployment gets no requests because of a Retry-After, ms; 0 for none."""
        at = slot * self.workers
        return max(self.retry_after_until_ms[at : at + self.workers])

    def clear_worker(self, worker: int) -> int:
        """Free the reservations of a dead worker, and return their number. Its counters stay."""
        freed = 0
        for slot in range(DEPLOYMENTS_MAX):
            at = slot * self.workers + worker
            freed += self.in_flight[at]
            self.in_flight[at] = self.milliunits[at] = self.retry_after_until_ms[at] = 0
        for slot in range(GATEWAYS_MAX):
            self.waiting[slot * self.workers + worker] = 0
        for slot in range(ENDPOINTS_MAX):
            at = slot * self.workers + worker
            self.ejected_until_ms[at] = 0
            for work_cell in (WorkCell.PENDING_TOKENS, WorkCell.SEQUENCES, WorkCell.KV_TOKENS):
                self.work[at * WORK_CELLS + work_cell] = 0
        for cell in _CLEARED_AT_DEATH:
            self.set(worker, cell, 0)
        return freed

    def add_series(self, worker: int, name: str) -> int:
        """Give a series a cell in a worker's column, and return its index in `series`; -1 if the column is full.

        Shape: `name` is the exposition name with its labels, `fleetgate_requests_total{gateway="chat",...}`.
        """
        count, used = self.get(worker, WorkerCell.SERIES_COUNT), self.get(worker, WorkerCell.NAMES_BYTES)
        line = name.encode() + b"\n"
        if count >= SERIES_MAX or used + len(line) > SERIES_NAMES_BYTES:
            return -1
        at = worker * SERIES_NAMES_BYTES + used
        self._names[at : at + len(line)] = line
        self.set(worker, WorkerCell.NAMES_BYTES, used + len(line))
        # Last, so that a reader never sees a cell without its name.
        self.set(worker, WorkerCell.SERIES_COUNT, count + 1)
        return worker * SERIES_MAX + count

    def series_of(self, worker: int) -> Iterator[tuple[str, int]]:
        """Yield the name of every series of a worker and its index in `series`."""
        count, used = self.get(worker, WorkerCell.SERIES_COUNT), self.get(worker, WorkerCell.NAMES_BYTES)
        at = worker * SERIES_NAMES_BYTES
        names = bytes(self._names[at : at + used]).decode().splitlines()
        for index, name in enumerate(names[:count]):
            yield name, worker * SERIES_MAX + index

    def series_totals(self) -> dict[str, int]:
        """Return the sum of every series over all workers."""
        totals: dict[str, int] = {}
        for worker in range(self.workers):
            for name, index in self.series_of(worker):
                totals[name] = totals.get(name, 0) + self.series[index]
        return totals
