"""A rolling upgrade: workers with the code on disk start beside the old workers, and then the old workers exit.

    idle ──requested──▶ starting ──all accept──▶ draining ──all exited──▶ idle
                           └──one exited, or too late──▶ idle (the old workers never stopped serving)

Both generations accept from the same listening sockets, so no connection is lost in the backlog of a closed socket.
"""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.supervisor.child_process import ChildProcess

START_S_MAX = 60.0  # a start takes half a second; a machine that swaps may need longer
DRAIN_S_MAX = 615.0  # a retired worker ends its last response after 600 s, and then needs time to exit


class UpgradeStage(StrEnum):
    """The state of a rolling upgrade."""

    IDLE = "idle"
    STARTING = "starting"
    DRAINING = "draining"


class UpgradeHooks(msgspec.Struct, frozen=True):
    """What `fleetgate up` gives the supervisor for upgrades.

    Shape: `workers_of` makes the workers of generation 0 or 1; `emit_event` takes one sentence.
    """

    workers_of: Callable[[int], list[ChildProcess]]
    emit_event: Callable[[str], None]


class ProcessControl(msgspec.Struct, frozen=True):
    """What the supervisor does for an upgrade.

    Shape: `retire` asks a worker to finish its responses and exit; `kill` ends it at once.
    """

    workers_of: Callable[[int], list[ChildProcess]]
    start: Callable[[ChildProcess, float], None]
    retire: Callable[[ChildProcess], None]
    kill: Callable[[ChildProcess], None]
    emit_event: Callable[[str], None]


class RollingUpgrade:
    """The workers of both generations: `serving`, `starting` (not accepting yet) and `draining`."""

    def __init__(self, shared_memory: SharedMemory, workers: list[ChildProcess], control: ProcessControl) -> None:
        self._shared_memory = shared_memory
        self._control = control
        self._generation = 0
        self._stage_began_s = 0.0
        self._requested = False
        self.stage = UpgradeStage.IDLE
        self.serving = workers
        self.starting: list[ChildProcess] = []
        self.draining: list[ChildProcess] = []

    @property
    def all_workers(self) -> list[ChildProcess]:
        """The workers of both generations."""
        return [*self.serving, *self.starting, *self.draining]

    def request(self) -> None:
        """Replace the workers; an upgrade that runs is finished first."""
        if self.stage is not UpgradeStage.IDLE:
            self._control.emit_event("an upgrade is running; the next one begins when all replaced workers have exited")
        self._requested = True

    def poll(self, now_s: float) -> bool:
        """Take the next step. Return True if the new workers have just taken over."""
        match self.stage:
            case UpgradeStage.IDLE:
                if self._requested:
                    self._begin(now_s)
            case UpgradeStage.STARTING:
                return self._poll_starting(now_s)
            case UpgradeStage.DRAINING:
                self._poll_draining(now_s)
        return False

    def _begin(self, now_s: float) -> None:
        self._requested = False
        self._stage_began_s = now_s
        self._generation = 1 - self._generation
        self.stage = UpgradeStage.STARTING
        self.starting = self._control.workers_of(self._generation)
        for child in self.starting:
            self._control.start(child, now_s)

    def _poll_starting(self, now_s: float) -> bool:
        for child in self.starting:
            code = child.process.poll() if child.process is not None else None
            if code is not None:
                self._cancel(f"new {child.name} exited with code {code} before it accepted connections")
                return False
        if all(self._shared_memory.get(child.worker, WorkerCell.ACCEPTING) for child in self.starting):
            for child in self.serving:
                self._control.retire(child)
            self.draining, self.serving, self.starting = self.serving, self.starting, []
            self.stage, self._stage_began_s = UpgradeStage.DRAINING, now_s
            self._control.emit_event(
                f"{len(self.serving)} new workers serve; {len(self.draining)} old workers finish their responses and "
                "exit"
            )
            return True
        if now_s - self._stage_began_s > START_S_MAX:
            self._cancel(f"the new workers did not accept connections within {START_S_MAX:.0f} s")
        return False

    def _cancel(self, reason: str) -> None:
        for child in self.starting:
            self._end(child)
        self.starting = []
        self._generation = 1 - self._generation
        self.stage = UpgradeStage.IDLE
        self._control.emit_event(f"the upgrade was cancelled and the old workers keep serving: {reason}")

    def _poll_draining(self, now_s: float) -> None:
        for child in list(self.draining):
            exited = child.process is None or child.process.poll() is not None
            if exited or now_s - self._stage_began_s > DRAIN_S_MAX:
                self._end(child)
                self.draining.remove(child)
        if not self.draining:
            self.stage = UpgradeStage.IDLE
            self._control.emit_event("the upgrade is complete: all old workers have exited")

    def _end(self, child: ChildProcess) -> None:
        self._control.kill(child)
        self._shared_memory.clear_worker(child.worker)
        # The column's next start is a planned one, not a restart to report; other workers may try its Snapshot now.
        for cell in (WorkerCell.STARTS, WorkerCell.SNAPSHOT_TRYING, WorkerCell.SNAPSHOT_RETURNED):
            self._shared_memory.set(child.worker, cell, 0)
