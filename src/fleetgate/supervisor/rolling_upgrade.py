"""A rolling upgrade: new workers with the code on disk come up beside the old ones, then the old ones leave.

    idle ──asked──▶ coming ──all accept──▶ leaving ──all ended──▶ idle
                      └──one ended, or too late──▶ idle (the old ones never stopped serving)

Both generations accept from the same listening sockets, so no connection waits in a queue that somebody closes.
"""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.supervisor.child_process import ChildProcess

COME_UP_S_MAX = 60.0  # a start takes half a second; a machine that swaps may need longer
RETIRED_S_MAX = 615.0  # the workers' own limit and some slack


class UpgradeStage(StrEnum):
    """How far a succession is."""

    IDLE = "idle"
    COMING = "coming"
    LEAVING = "leaving"


class UpgradeHooks(msgspec.Struct, frozen=True):
    """What only the caller knows. Shape: `workers_of` gives those of generation 0 or 1; `tell` makes an Event."""

    workers_of: Callable[[int], list[ChildProcess]]
    tell: Callable[[str], None]


class ProcessControl(msgspec.Struct, frozen=True):
    """What the supervisor does for a succession.

    Shape: `retire` asks one to leave; `kill` ends one at once; `tell` makes an Event.
    """

    workers_of: Callable[[int], list[ChildProcess]]
    start: Callable[[ChildProcess, float], None]
    retire: Callable[[ChildProcess], None]
    kill: Callable[[ChildProcess], None]
    tell: Callable[[str], None]


class RollingUpgrade:
    """Decides who serves. `serving` are the workers to keep running; `leaving` those that finish their answers."""

    def __init__(self, board: SharedMemory, workers: list[ChildProcess], hands: ProcessControl) -> None:
        self._board = board
        self._hands = hands
        self._generation = 0
        self._began_s = 0.0
        self._asked = False
        self.stage = UpgradeStage.IDLE
        self.serving = workers
        self.coming: list[ChildProcess] = []
        self.leaving: list[ChildProcess] = []

    @property
    def everyone(self) -> list[ChildProcess]:
        """All workers there are."""
        return [*self.serving, *self.coming, *self.leaving]

    def ask(self) -> None:
        """Replace the workers; one that is under way is finished first."""
        if self.stage is not UpgradeStage.IDLE:
            self._hands.tell("an upgrade is under way; the next begins when the workers it replaced have ended")
        self._asked = True

    def look(self, now_s: float) -> bool:
        """Take the next step; True when new workers have just taken over."""
        match self.stage:
            case UpgradeStage.IDLE:
                if self._asked:
                    self._begin(now_s)
            case UpgradeStage.COMING:
                return self._watch_coming(now_s)
            case UpgradeStage.LEAVING:
                self._watch_leaving(now_s)
        return False

    def _begin(self, now_s: float) -> None:
        self._asked = False
        self._began_s = now_s
        self._generation = 1 - self._generation
        self.stage = UpgradeStage.COMING
        self.coming = self._hands.workers_of(self._generation)
        for child in self.coming:
            self._hands.start(child, now_s)

    def _watch_coming(self, now_s: float) -> bool:
        for child in self.coming:
            code = child.process.poll() if child.process is not None else None
            if code is not None:
                self._give_up(f"{child.name} of the new ones ended with exit code {code} before it served")
                return False
        if all(self._board.get(child.worker, WorkerCell.ACCEPTING) for child in self.coming):
            for child in self.serving:
                self._hands.retire(child)
            self.leaving, self.serving, self.coming = self.serving, self.coming, []
            self.stage, self._began_s = UpgradeStage.LEAVING, now_s
            self._hands.tell(f"{len(self.serving)} new workers serve; the old ones finish their answers and end")
            return True
        if now_s - self._began_s > COME_UP_S_MAX:
            self._give_up(f"the new workers did not serve within {COME_UP_S_MAX:.0f} s")
        return False

    def _give_up(self, reason: str) -> None:
        for child in self.coming:
            self._end(child)
        self.coming = []
        self._generation = 1 - self._generation
        self.stage = UpgradeStage.IDLE
        self._hands.tell(f"the upgrade was given up, and the workers from before it go on: {reason}")

    def _watch_leaving(self, now_s: float) -> None:
        for child in list(self.leaving):
            ended = child.process is None or child.process.poll() is not None
            if ended or now_s - self._began_s > RETIRED_S_MAX:
                self._end(child)
                self.leaving.remove(child)
        if not self.leaving:
            self.stage = UpgradeStage.IDLE
            self._hands.tell("the upgrade is done: all workers are new ones")

    def _end(self, child: ChildProcess) -> None:
        self._hands.kill(child)
        self._board.clear_worker(child.worker)
        # Its next start is asked for, and none to be told of; what it had on trial is others' to try now.
        for cell in (WorkerCell.STARTS, WorkerCell.SNAPSHOT_TRYING, WorkerCell.SNAPSHOT_RETURNED):
            self._board.set(child.worker, cell, 0)
