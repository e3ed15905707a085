"""Which Snapshot a worker uses: a new one goes to one worker first, then to the others, and back if it does harm.

What one worker found out the others read off the board. Keys never wait: a change of nothing else is taken at once, and
going back to the last good Snapshot keeps the newest keys, so that a deleted key does not come back to life.
"""

from typing import NamedTuple, Protocol

import msgspec

from fleetgate.core.canary_analysis import AttemptCounts, CanaryStage, CanaryTrial, next_stage, retry_after_s
from fleetgate.core.model import Snapshot, same_routing
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.snapshot.failure_rates import FailureRateReader
from fleetgate.proxy.snapshot.snapshot_file import EMPTY, SnapshotFile

FOLLOW_S_MAX = 0.35  # a canary that hangs holds a change up for no longer
ALIVE_MS_MAX = 500  # since a worker's last sweep
BASIS_EVERY_S = 5.0  # so the time before a change that it is compared with is 5 to 10 s


class Baseline(NamedTuple):
    """Counts at a moment."""

    at_s: float
    own: AttemptCounts
    others: AttemptCounts


class SnapshotUser(Protocol):
    """The worker around it."""

    def take(self, snapshot: Snapshot) -> bool:
        """Use a Snapshot from now on; False, and a line in the log, where it cannot be used."""

    def keep(self, data: bytes, version: int) -> None:
        """Write the last good copy, without waiting for it."""

    def emit_event(self, version: int, message: str) -> None:
        """An Event."""


class Rollout:
    """One worker's way from Snapshot to Snapshot. `careful` False takes each at once, without a trial."""

    def __init__(
        self, file: SnapshotFile, board: SharedMemory, index: int, owner: SnapshotUser, careful: bool = True
    ) -> None:
        self._file = file
        self._board = board
        self._index = index
        self._owner = owner
        self._careful = careful
        self._reader = FailureRateReader(board)
        self._current = EMPTY
        self._good = EMPTY  # what is gone back to
        self._next: Snapshot | None = None  # seen, and not in use
        self._next_since_s = 0.0
        self._taken_s = 0.0
        self._trial: CanaryTrial | None = None
        self._basis = [Baseline(0.0, AttemptCounts(), AttemptCounts())] * 2

    # --- from start to end ---

    def start(self, now_s: float) -> None:
        """Take what there is: the file, or the last good copy where the file is not good or was returned from."""
        good, newest = self._file.last_good(), self._file.changed()
        died_with = self._board.get(self._index, WorkerCell.SNAPSHOT_TRYING)
        self._set(WorkerCell.SNAPSHOT_TRYING, 0)
        if newest is not None and good is not None and self._careful and newest.version != good.version:
            bad = {died_with, self._file.given_up(), *self._cells(WorkerCell.SNAPSHOT_RETURNED)}
            if newest.version in bad and self._owner.take(msgspec.structs.replace(good, keys=newest.keys)):
                self._current = self._good = msgspec.structs.replace(good, keys=newest.keys)
                self._next, self._next_since_s = newest, now_s
                self._perhaps_own_the_trial(newest.version, now_s)
                return
            if self._is_trying():
                self._good = good
        for one in (newest, good):
            if one is not None and self._take(one, now_s):
                if not self._is_trying():
                    self._settle()
                return

    def _perhaps_own_the_trial(self, version: int, now_s: float) -> None:
        """Somebody has to try again what was given up: who gave it up, or anyone where that is not known."""
        returned = self._cells(WorkerCell.SNAPSHOT_RETURNED)
        if returned[self._index] == version or version not in returned:
            self._set(WorkerCell.SNAPSHOT_RETURNED, version)
            none = AttemptCounts()
            self._trial = CanaryTrial(CanaryStage.WAITING, now_s, none, none, none, none, returns=1)

    def tick(self, now_s: float) -> None:
        """Ten times a second. Cost: 4 µs when nothing changed."""
        if now_s - self._basis[1].at_s >= BASIS_EVERY_S:
            self._basis = [self._basis[1], Baseline(now_s, self._own(), self._others())]
        newest = self._file.changed()
        if newest is not None:
            self._arrived(newest, now_s)
        if self._trial is not None:
            self._judge(self._trial, now_s)
        elif self._next is not None:
            self._consider(self._next, now_s)
        elif self._good is not self._current:
            if self._current.version in self._cells(WorkerCell.SNAPSHOT_RETURNED):
                self._go_back(now_s)
            elif not self._is_trying():
                self._good = self._current

    @property
    def is_urgent(self) -> bool:
        """Whether to look sooner: others wait for this worker, or it waits for one of them."""
        trial = self._trial
        return trial.stage is CanaryStage.LOOK if trial is not None else self._next is not None

    # --- a new one ---

    def _arrived(self, newest: Snapshot, now_s: float) -> None:
        if not self._careful or not self._current.version:
            if self._take(newest, now_s):
                self._settle()
        elif self._next is not None and same_routing(newest, self._next):
            self._take_keys(newest)
        elif self._next is None and same_routing(newest, self._current):
            if self._trial is not None:
                self._set(WorkerCell.SNAPSHOT_TRYING, newest.version)
            if self._take(newest, now_s) and not self._is_trying():
                self._good = self._current
                if self._is_canary(now_s):
                    self._settle()
        else:
            if max(self._cells(WorkerCell.SNAPSHOT_PROVEN)) >= self._current.version:
                self._good = self._current
            self._trial = None
            self._set(WorkerCell.SNAPSHOT_TRYING, 0)
            self._set(WorkerCell.SNAPSHOT_RETURNED, 0)
            self._next, self._next_since_s = newest, now_s

    def _take_keys(self, newest: Snapshot) -> None:
        """Its routing is not taken (yet), but keys do not wait for that."""
        if self._trial is not None:
            self._set(WorkerCell.SNAPSHOT_RETURNED, newest.version)
            self._file.give_up(newest.version)
        self._next = newest
        merged = msgspec.structs.replace(self._current, keys=newest.keys)
        if self._owner.take(merged):
            self._good = merged if self._good is self._current else self._good
            self._current = merged

    def _consider(self, newest: Snapshot, now_s: float) -> None:
        if newest.version in self._cells(WorkerCell.SNAPSHOT_RETURNED):
            self._next_since_s = now_s
        elif max(self._cells(WorkerCell.SNAPSHOT_PROVEN)) >= newest.version:
            self._take(newest, now_s)
        elif self._is_canary(now_s):
            self._try(newest, now_s)
        elif now_s - self._next_since_s > FOLLOW_S_MAX:
            self._take(newest, now_s)

    def _try(self, newest: Snapshot, now_s: float) -> None:
        """Take it before the others do."""
        self._set(WorkerCell.SNAPSHOT_TRYING, newest.version)
        before, before_all = self._before()
        if not self._take(newest, now_s):
            self._set(WorkerCell.SNAPSHOT_RETURNED, newest.version)
            self._set(WorkerCell.SNAPSHOT_TRYING, 0)
            self._next = None
            self._owner.emit_event(newest.version, f"Snapshot {newest.version} cannot be used; {self._stays()}.")
            return
        self._trial = CanaryTrial(CanaryStage.LOOK, now_s, before, before_all, self._own(), self._others())

    # --- on trial ---

    def _judge(self, trial: CanaryTrial, now_s: float) -> None:
        after = next_stage(trial, self._own(), self._others(), now_s)
        self._trial = after
        if after.stage is trial.stage:
            return
        match after.stage:
            case CanaryStage.PROBATION:
                self._set(WorkerCell.SNAPSHOT_PROVEN, self._current.version)
            case CanaryStage.GOOD:
                self._settle()
            case CanaryStage.RETURNED:
                self._return(after, trial.stage, now_s)
            case CanaryStage.WAITING:
                pass
            case CanaryStage.LOOK | CanaryStage.CLEARED if self._next is not None:
                self._again(after, self._next, now_s)

    def _return(self, trial: CanaryTrial, stage: CanaryStage, now_s: float) -> None:
        given_up, took_s = self._current.version, now_s - self._taken_s
        self._set(WorkerCell.SNAPSHOT_RETURNED, given_up)
        self._set(WorkerCell.SNAPSHOT_PROVEN, self._good.version)
        self._set(WorkerCell.SNAPSHOT_TRYING, 0)
        self._file.give_up(given_up)
        bad, everywhere = trial.bad, stage is CanaryStage.PROBATION
        who = "all workers" if everywhere else f"worker {self._index}"
        before = trial.before_all if everywhere else trial.before
        self._go_back(now_s)
        self._owner.emit_event(
            given_up,
            f"Snapshot {given_up} was given up after {took_s:.1f} s: with it {bad.failed} of {bad.ended} requests of "
            f"{who} failed, before it {before.failed} of {before.ended}; {self._stays()}, and the other "
            f"is tried again in {retry_after_s(trial.returns):.0f} s, sooner if going back does not help.",
        )

    def _go_back(self, now_s: float) -> None:
        newest = self._current
        back = msgspec.structs.replace(self._good, keys=newest.keys)
        if self._owner.take(back):
            self._current = self._good = back
            self._next, self._next_since_s = newest, now_s

    def _again(self, trial: CanaryTrial, newest: Snapshot, now_s: float) -> None:
        """Take what was returned from: on trial once more, or for good because going back did not help."""
        self._set(WorkerCell.SNAPSHOT_RETURNED, 0)
        before, before_all = self._before()
        if not self._take(newest, now_s):
            return
        if trial.stage is CanaryStage.LOOK:
            self._set(WorkerCell.SNAPSHOT_TRYING, newest.version)
            self._trial = msgspec.structs.replace(trial, before=before, before_all=before_all)
            return
        self._owner.emit_event(
            newest.version, f"Snapshot {newest.version} is in use again: requests failed as often without it."
        )
        self._settle()

    # --- small services ---

    def _take(self, snapshot: Snapshot, now_s: float) -> bool:
        self._next = None
        if not self._owner.take(snapshot):
            return False
        if not self._good.version:
            self._good = snapshot
        self._current, self._taken_s = snapshot, now_s
        return True

    def _settle(self) -> None:
        """What is in use is the last good one now."""
        self._trial = None
        self._good = self._current
        version = self._current.version
        for cell, value in (
            (WorkerCell.SNAPSHOT_PROVEN, version),
            (WorkerCell.SNAPSHOT_TRYING, 0),
            (WorkerCell.SNAPSHOT_RETURNED, 0),
        ):
            self._set(cell, value)
        self._file.give_up(0)
        self._owner.keep(self._file.data, version)

    def _stays(self) -> str:
        return f"Snapshot {self._good.version} is in use" if self._good.version else "there is none to go back to"

    def _is_canary(self, now_s: float) -> bool:
        """The first of those that live and accept."""
        board, oldest_ms = self._board, now_s * 1000 - ALIVE_MS_MAX
        for worker in range(board.workers):
            if worker == self._index:
                return bool(board.get(worker, WorkerCell.ACCEPTING))
            if board.get(worker, WorkerCell.ACCEPTING) and board.get(worker, WorkerCell.HEARTBEAT_MS) >= oldest_ms:
                return False
        return False

    def _is_trying(self) -> bool:
        """Whether any worker has a Snapshot on trial."""
        return any(self._cells(WorkerCell.SNAPSHOT_TRYING))

    def _cells(self, cell: WorkerCell) -> list[int]:
        return [self._board.get(worker, cell) for worker in range(self._board.workers)]

    def _set(self, cell: WorkerCell, value: int) -> None:
        self._board.set(self._index, cell, value)

    def _gateways(self) -> list[str]:
        """Those that both have: what fails in a new Gateway would not do better without it."""
        return [gateway.name for gateway in self._good.gateways]

    def _before(self) -> tuple[AttemptCounts, AttemptCounts]:
        """What ended in the last seconds, in this worker and in all."""
        basis = self._basis[0]
        own = self._own().minus(basis.own)
        return own, own.plus(self._others().minus(basis.others))

    def _own(self) -> AttemptCounts:
        return self._reader.of(self._index, self._gateways())

    def _others(self) -> AttemptCounts:
        return self._reader.of_others(self._index, self._gateways())
