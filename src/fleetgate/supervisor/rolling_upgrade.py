"""A rolling upgrade: new workers with the code on disk come up beside the old ones, then the old ones leave.

    idle ──asked──▶ coming ──all accept──▶ leaving ──all ended──▶ idle
                      └──one ended, or too late──▶ idle (the old ones never stopped serving)

Both generations accept from the same listening sockets, so no connection waits in a queue that somebody closes.
"""

from collections.abc import Callable
from enum import StrEnum

import msgspec

from fleetgate.ipc.shared_memory import Board, Worker
from fleetgate.supervisor.child_process import Child

COME_UP_S_MAX = 60.0  # a start takes half a second; a machine that swaps may need longer
RETIRED_S_MAX = 615.0  # the workers' own limit and some slack


class Stage(StrEnum):
    """How far a succession is."""

    IDLE = "idle"
    COMING = "coming"
    LEAVING = "leaving"


class Renewal(msgspec.Struct, frozen=True):
    """What only the caller knows. Shape: `workers_of` gives those of generation 0 or 1; `tell` makes an Event."""

    workers_of: Callable[[int], list[Child]]
    tell: Callable[[str], None]


class Hands(msgspec.Struct, frozen=True):
    """What the supervisor does for a succession.

    Shape: `retire` asks one to leave; `kill` ends one at once; `tell` makes an Event.
    """

    workers_of: Callable[[int], list[Child]]
    start: Callable[[Child, float], None]
    retire: Callable[[Child], None]
    kill: Callable[[Child], None]
    tell: Callable[[str], None]


class Succession:
    """Decides who serves. `serving` are the workers to keep running; `leaving` those that finish their answers."""

    def __init__(self, board: Board, workers: list[Child], hands: Hands) -> None:
        self._board = board
        self._hands = hands
        self._generation = 0
        self._began_s = 0.0
        self._asked = False
        self.stage = Stage.IDLE
        self.serving = workers
        self.coming: list[Child] = []
        self.leaving: list[Child] = []

    @property
    def everyone(self) -> list[Child]:
        """All workers there are."""
        return [*self.serving, *self.coming, *self.leaving]

    def ask(self) -> None:
        """Replace the workers; one that is under way is finished first."""
        if self.stage is not Stage.IDLE:
            self._hands.tell("an upgrade is under way; the next begins when the workers it replaced have ended")
        self._asked = True

    def look(self, now_s: float) -> bool:
        """Take the next step; True when new workers have just taken over."""
        match self.stage:
            case Stage.IDLE:
                if self._asked:
                    self._begin(now_s)
            case Stage.COMING:
                return self._watch_coming(now_s)
            case Stage.LEAVING:
                self._watch_leaving(now_s)
        return False

    def _begin(self, now_s: float) -> None:
        self._asked = False
        self._began_s = now_s
        self._generation = 1 - self._generation
        self.stage = Stage.COMING
        self.coming = self._hands.workers_of(self._generation)
        for child in self.coming:
            self._hands.start(child, now_s)

    def _watch_coming(self, now_s: float) -> bool:
        for child in self.coming:
            code = child.process.poll() if child.process is not None else None
            if code is not None:
                self._give_up(f"{child.name} of the new ones ended with exit code {code} before it served")
                return False
        if all(self._board.get(child.worker, Worker.ACCEPTING) for child in self.coming):
            for child in self.serving:
                self._hands.retire(child)
            self.leaving, self.serving, self.coming = self.serving, self.coming, []
            self.stage, self._began_s = Stage.LEAVING, now_s
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
        self.stage = Stage.IDLE
        self._hands.tell(f"the upgrade was given up, and the workers from before it go on: {reason}")

    def _watch_leaving(self, now_s: float) -> None:
        for child in list(self.leaving):
            ended = child.process is None or child.process.poll() is not None
            if ended or now_s - self._began_s > RETIRED_S_MAX:
                self._end(child)
                self.leaving.remove(child)
        if not self.leaving:
            self.stage = Stage.IDLE
            self._hands.tell("the upgrade is done: all workers are new ones")

    def _end(self, child: Child) -> None:
        self._hands.kill(child)
        self._board.sweep(child.worker)
        # Its next start is asked for, and none to be told of; what it had on trial is others' to try now.
        for cell in (Worker.STARTS, Worker.SNAPSHOT_TRYING, Worker.SNAPSHOT_RETURNED):
            self._board.set(child.worker, cell, 0)
