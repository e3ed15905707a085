"""What every part of the control process works with."""

import asyncio
import time

import msgspec
import structlog

from fleetgate.control.config import ControlConfig
from fleetgate.control.data_dir import DataDir, DataDirUnusable
from fleetgate.control.resources.apply import ApplyResult, ResourceWriter
from fleetgate.control.snapshot.publisher import Publisher
from fleetgate.control.store import repository as rows
from fleetgate.control.store.database import Database
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell

KEY_CHANGE_S_MAX = (
    0.5  # DESIGN.md section 3: a change of keys returns when this machine's workers have it, or after this
)
CHANGE_S_MAX = 2.0  # other changes go to one worker first; on a busy machine that takes longer
_LOOK_EVERY_S = 0.01

log = structlog.get_logger()


class StartedProcess(msgspec.Struct):
    """The version that carried what was given at start, and when it was published (monotonic seconds)."""

    version: int = 0
    at_s: float = 0.0


class Control:
    """The control process's parts, put together once."""

    def __init__(
        self,
        config: ControlConfig,
        data_dir: DataDir,
        database: Database,
        changes: ResourceWriter,
        publisher: Publisher,
    ) -> None:
        self.config = config
        self.data_dir = data_dir
        self.database = database
        self.changes = changes
        self.publisher = publisher
        self.board: SharedMemory | None = None
        self.started = StartedProcess()

    async def adopted(self, keys_only: bool = False) -> None:
        """Return once every live worker has what is stored now or one has given it up, or after a while."""
        try:
            async with asyncio.timeout(KEY_CHANGE_S_MAX if keys_only else CHANGE_S_MAX):
                version = await self.publisher.settle()
                while not self.has_everywhere(version):  # noqa: ASYNC110 - nothing rings when shared memory changes
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            log.warning("slow_adoption", version=self.publisher.version)

    def has_everywhere(self, version: int) -> bool:
        """Whether every live worker uses this version or a later one, or it was given up."""
        board = self.board
        if board is None:
            return True
        live = [worker for worker in range(board.workers) if board.get(worker, WorkerCell.PID)]
        if any(board.get(worker, WorkerCell.SNAPSHOT_RETURNED) == version for worker in live):
            return True
        return all(board.get(worker, WorkerCell.SNAPSHOT_VERSION) >= version for worker in live)

    def record(self, kind: str, name: str, sentence: str) -> None:
        """Write an Event. One that the disk refuses is logged and left out: it must not stop what it tells of."""
        try:
            with self.database.write() as connection:
                rows.add_event(connection, time.time(), kind, name, sentence)
        except DataDirUnusable as error:
            log.error("event_not_kept", sentence=sentence, reason=str(error))


def newest_version_in_use(board: SharedMemory | None) -> int:
    """The newest version that a worker uses or has given up."""
    cells = (WorkerCell.SNAPSHOT_VERSION, WorkerCell.SNAPSHOT_RETURNED)
    return (
        max((board.get(worker, cell) for worker in range(board.workers) for cell in cells), default=0) if board else 0
    )


def has_changes(results: list[ApplyResult]) -> bool:
    """Whether there is something for the workers to take up."""
    return any(result.outcome != "unchanged" for result in results)
