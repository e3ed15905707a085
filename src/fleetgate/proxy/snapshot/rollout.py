"""Which Snapshot a worker uses. One worker, the canary, tries a new one first; it is rolled back if requests fail.

Workers read the canary's result in shared memory. A change of keys alone is activated at once. A rollback keeps the
newest keys: otherwise a deleted key would become valid again.
"""

from typing import NamedTuple, Protocol

import msgspec

from fleetgate.core.canary_analysis import AttemptCounts, CanaryStage, CanaryTrial, next_stage, retry_after_s
from fleetgate.core.model import Snapshot, same_routing
from fleetgate.ipc.shared_memory import SharedMemory, WorkerCell
from fleetgate.proxy.snapshot.failure_rates import FailureRateReader
from fleetgate.proxy.snapshot.snapshot_file import EMPTY, SnapshotFile

FOLLOW_S_MAX = 0.35  # others then use the Snapshot although the canary has reported nothing: it may hang
ALIVE_MS_MAX = 500  # since a worker's last heartbeat
BASELINE_EVERY_S = 5.0  # a Snapshot is compared with the 5 to 10 s before it


class Baseline(NamedTuple):
    """The counts of this worker and of all others at a moment."""

    at_s: float
    own: AttemptCounts
    others: AttemptCounts


class SnapshotUser(Protocol):
    """What a rollout asks of its worker."""

    def take(self, snapshot: Snapshot) -> bool:
        """Use a Snapshot from now on; False, and a line in the log, if it cannot be used."""

    def keep(self, data: bytes, version: int) -> None:
        """Write the last good copy, without waiting for the disk."""

    def emit_event(self, version: int, message: str) -> None:
        """Emit an Event about a version."""


class Rollout:
    """The rollout of Snapshots in one worker. Shape: with `careful` False each is used at once, without a trial."""

    def __init__(
        self, file: SnapshotFile, shared: SharedMemory, index: int, user: SnapshotUser, careful: bool = True
    ) -> None:
        self._file = file
        self._shared = shared
        self._index = index
        self._user = user
        self._careful = careful
        self._reader = FailureRateReader(shared)
        self._current = EMPTY
        self._good = EMPTY  # the target of a rollback
        self._next: Snapshot | None = None  # read, but not in use
        self._next_since_s = 0.0
        self._activated_s = 0.0
        self._trial: CanaryTrial | None = None
        self._baselines = [Baseline(0.0, AttemptCounts(), AttemptCounts())] * 2

    # --- start and ticks ---

    def start(self, now_s: float) -> None:
        """Use the file's Snapshot, or the last good copy if the file is not good or its Snapshot was rolled back."""
        good, newest = self._file.last_good(), self._file.changed()
        tried_before = self._shared.get(self._index, WorkerCell.SNAPSHOT_TRYING)
        self._set(WorkerCell.SNAPSHOT_TRYING, 0)
        if newest is not None and good is not None and self._careful and newest.version != good.version:
            bad = {tried_before, self._file.given_up(), *self._cells(WorkerCell.SNAPSHOT_RETURNED)}
            if newest.version in bad and self._user.take(msgspec.structs.replace(good, keys=newest.keys)):
                self._current = self._good = msgspec.structs.replace(good, keys=newest.keys)
                self._next, self._next_since_s = newest, now_s
                self._begin_retrial(newest.version, now_s)
                return
            if self._is_trying():
                self._good = good
        for snapshot in (newest, good):
            if snapshot is not None and self._take(snapshot, now_s):
                if not self._is_trying():
                    self._settle()
                return

    def _begin_retrial(self, version: int, now_s: float) -> None:
        """Try the Snapshot again later, if this worker rolled it back or if no worker is known to have done so."""
        returned = self._cells(WorkerCell.SNAPSHOT_RETURNED)
        if returned[self._index] == version or version not in returned:
            self._set(WorkerCell.SNAPSHOT_RETURNED, version)
            none = AttemptCounts()
            self._trial = CanaryTrial(CanaryStage.WAITING, now_s, none, none, none, none, returns=1)

    def tick(self, now_s: float) -> None:
        """Follow the file and the other workers. Called ten times a second. Cost: 4 µs if nothing changed."""
        if now_s - self._baselines[1].at_s >= BASELINE_EVERY_S:
            self._baselines = [self._baselines[1], Baseline(now_s, self._own(), self._others())]
        newest = self._file.changed()
        if newest is not None:
            self._on_new_snapshot(newest, now_s)
        if self._trial is not None:
            self._continue_trial(self._trial, now_s)
        elif self._next is not None:
            self._take_if_due(self._next, now_s)
        elif self._good is not self._current:
            if self._current.version in self._cells(WorkerCell.SNAPSHOT_RETURNED):
                self._roll_back(now_s)
            elif not self._is_trying():
                self._good = self._current

    @property
    def is_urgent(self) -> bool:
        """Whether to tick sooner: other workers wait for this one, or it waits for one of them."""
        trial = self._trial
        return trial.stage is CanaryStage.LOOK if trial is not None else self._next is not None

    # --- a new Snapshot ---

    def _on_new_snapshot(self, newest: Snapshot, now_s: float) -> None:
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
        """Use the keys of a Snapshot while its routing is not in use."""
        if self._trial is not None:
            self._set(WorkerCell.SNAPSHOT_RETURNED, newest.version)
            self._file.give_up(newest.version)
        self._next = newest
        merged = msgspec.structs.replace(self._current, keys=newest.keys)
        if self._user.take(merged):
            self._good = merged if self._good is self._current else self._good
            self._current = merged

    def _take_if_due(self, newest: Snapshot, now_s: float) -> None:
        if newest.version in self._cells(WorkerCell.SNAPSHOT_RETURNED):
            self._next_since_s = now_s
        elif max(self._cells(WorkerCell.SNAPSHOT_PROVEN)) >= newest.version:
            self._take(newest, now_s)
        elif self._is_canary(now_s):
            self._try(newest, now_s)
        elif now_s - self._next_since_s > FOLLOW_S_MAX:
            self._take(newest, now_s)

    def _try(self, newest: Snapshot, now_s: float) -> None:
        """Use the Snapshot as the canary."""
        self._set(WorkerCell.SNAPSHOT_TRYING, newest.version)
        before, before_all = self._before()
        if not self._take(newest, now_s):
            self._set(WorkerCell.SNAPSHOT_RETURNED, newest.version)
            self._set(WorkerCell.SNAPSHOT_TRYING, 0)
            self._next = None
            self._user.emit_event(newest.version, f"Snapshot {newest.version} cannot be used; {self._in_use_text()}.")
            return
        self._trial = CanaryTrial(CanaryStage.LOOK, now_s, before, before_all, self._own(), self._others())

    # --- the trial ---

    def _continue_trial(self, trial: CanaryTrial, now_s: float) -> None:
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
                self._give_up(after, trial.stage, now_s)
            case CanaryStage.WAITING:
                pass
            case CanaryStage.LOOK | CanaryStage.CLEARED if self._next is not None:
                self._retake(after, self._next, now_s)

    def _give_up(self, trial: CanaryTrial, stage: CanaryStage, now_s: float) -> None:
        given_up, used_s = self._current.version, now_s - self._activated_s
        self._set(WorkerCell.SNAPSHOT_RETURNED, given_up)
        self._set(WorkerCell.SNAPSHOT_PROVEN, self._good.version)
        self._set(WorkerCell.SNAPSHOT_TRYING, 0)
        self._file.give_up(given_up)
        bad, everywhere = trial.bad, stage is CanaryStage.PROBATION
        workers = "all workers" if everywhere else f"worker {self._index}"
        before = trial.before_all if everywhere else trial.before
        self._roll_back(now_s)
        self._user.emit_event(
            given_up,
            f"Snapshot {given_up} was rolled back after {used_s:.1f} s: {bad.failed} of {bad.ended} requests of "
            f"{workers} failed with it and {before.failed} of {before.ended} before it; {self._in_use_text()}. "
            f"Snapshot {given_up} is tried again in {retry_after_s(trial.returns):.0f} s, or sooner if as many "
            "requests fail without it.",
        )

    def _roll_back(self, now_s: float) -> None:
        newest = self._current
        back = msgspec.structs.replace(self._good, keys=newest.keys)
        if self._user.take(back):
            self._current = self._good = back
            self._next, self._next_since_s = newest, now_s

    def _retake(self, trial: CanaryTrial, newest: Snapshot, now_s: float) -> None:
        """Use the Snapshot that was rolled back: on trial again, or for good because the rollback did not help."""
        self._set(WorkerCell.SNAPSHOT_RETURNED, 0)
        before, before_all = self._before()
        if not self._take(newest, now_s):
            return
        if trial.stage is CanaryStage.LOOK:
            self._set(WorkerCell.SNAPSHOT_TRYING, newest.version)
            self._trial = msgspec.structs.replace(trial, before=before, before_all=before_all)
            return
        self._user.emit_event(
            newest.version, f"Snapshot {newest.version} is in use again: as many requests failed without it."
        )
        self._settle()

    # --- parts ---

    def _take(self, snapshot: Snapshot, now_s: float) -> bool:
        self._next = None
        if not self._user.take(snapshot):
            return False
        if not self._good.version:
            self._good = snapshot
        self._current, self._activated_s = snapshot, now_s
        return True

    def _settle(self) -> None:
        """Make the Snapshot in use the last good one."""
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
        self._user.keep(self._file.data, version)

    def _in_use_text(self) -> str:
        return (
            f"Snapshot {self._good.version} is in use" if self._good.version else "there is no earlier Snapshot to use"
        )

    def _is_canary(self, now_s: float) -> bool:
        """Whether this is the first worker that is alive and accepts connections."""
        shared, oldest_ms = self._shared, now_s * 1000 - ALIVE_MS_MAX
        for worker in range(shared.workers):
            if worker == self._index:
                return bool(shared.get(worker, WorkerCell.ACCEPTING))
            if shared.get(worker, WorkerCell.ACCEPTING) and shared.get(worker, WorkerCell.HEARTBEAT_MS) >= oldest_ms:
                return False
        return False

    def _is_trying(self) -> bool:
        """Whether any worker has a Snapshot on trial."""
        return any(self._cells(WorkerCell.SNAPSHOT_TRYING))

    def _cells(self, cell: WorkerCell) -> list[int]:
        return [self._shared.get(worker, cell) for worker in range(self._shared.workers)]

    def _set(self, cell: WorkerCell, value: int) -> None:
        self._shared.set(self._index, cell, value)

    def _gateways(self) -> list[str]:
        """The Gateways that both Snapshots have: failures of a new Gateway are no reason for a rollback."""
        return [gateway.name for gateway in self._good.gateways]

    def _before(self) -> tuple[AttemptCounts, AttemptCounts]:
        """The requests that ended since the last baseline but one, in this worker and in all."""
        baseline = self._baselines[0]
        own = self._own().minus(baseline.own)
        return own, own.plus(self._others().minus(baseline.others))

    def _own(self) -> AttemptCounts:
        return self._reader.of(self._index, self._gateways())

    def _others(self) -> AttemptCounts:
        return self._reader.of_others(self._index, self._gateways())
