"""The services that the parts of the control process share."""

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

KEY_CHANGE_S_MAX = 0.5  # a change of keys returns when the workers of this machine use it, or after this time
CHANGE_S_MAX = 2.0  # other changes go to one worker first, which takes longer on a busy machine
_POLL_EVERY_S = 0.01

log = structlog.get_logger()


class StartedProcess(msgspec.Struct):
    """The version that contains the configuration given at start, and the time of its publication.

    Units: `at_s` in seconds of the monotonic clock.
    """

    version: int = 0
    at_s: float = 0.0


class Control:
    """The services of the control process."""

    def __init__(
        self,
        config: ControlConfig,
        data_dir: DataDir,
        database: Database,
        writer: ResourceWriter,
        publisher: Publisher,
    ) -> None:
        self.config = config
        self.data_dir = data_dir
        self.database = database
        self.writer = writer
        self.publisher = publisher
        self.shared_memory: SharedMemory | None = None
        self.started = StartedProcess()

    async def wait_adopted(self, keys_only: bool = False) -> None:
        """Wait until every live worker uses the stored state, or one has rejected it, or the time limit is over."""
        try:
            async with asyncio.timeout(KEY_CHANGE_S_MAX if keys_only else CHANGE_S_MAX):
                version = await self.publisher.wait_published()
                while not self.is_adopted(version):  # noqa: ASYNC110 - shared memory sends no notification
                    await asyncio.sleep(_POLL_EVERY_S)
        except TimeoutError:
            log.warning("slow_adoption", version=self.publisher.version)

    def is_adopted(self, version: int) -> bool:
        """Whether every live worker uses this version or a later one, or a worker has rejected it."""
        shared_memory = self.shared_memory
        if shared_memory is None:
            return True
        live = [worker for worker in range(shared_memory.workers) if shared_memory.get(worker, WorkerCell.PID)]
        if any(shared_memory.get(worker, WorkerCell.SNAPSHOT_RETURNED) == version for worker in live):
            return True
        return all(shared_memory.get(worker, WorkerCell.SNAPSHOT_VERSION) >= version for worker in live)

    def record(self, kind: str, name: str, sentence: str) -> None:
        """Write an Event. If the store cannot be written the Event is only logged, and the caller goes on."""
        try:
            with self.database.write() as connection:
                rows.add_event(connection, time.time(), kind, name, sentence)
        except DataDirUnusable as error:
            log.error("event_not_kept", sentence=sentence, reason=str(error))


def newest_version_in_use(shared_memory: SharedMemory | None) -> int:
    """The newest version that a worker uses or has rejected."""
    cells = (WorkerCell.SNAPSHOT_VERSION, WorkerCell.SNAPSHOT_RETURNED)
    return (
        max((shared_memory.get(worker, cell) for worker in range(shared_memory.workers) for cell in cells), default=0)
        if shared_memory
        else 0
    )


def has_changes(results: list[ApplyResult]) -> bool:
    """Whether a result changes anything for the workers."""
    return any(result.outcome != "unchanged" for result in results)
