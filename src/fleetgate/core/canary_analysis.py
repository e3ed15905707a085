"""Canary analysis of a new Snapshot: one worker uses it first, and the failures before and after decide.

Only failures that no change intends count (our 5xx and interrupted streams): a model or key that a change removes is
answered with 404 or 401 by design.
"""

from enum import StrEnum
from typing import NamedTuple

import msgspec

CANARY_S = 0.2  # the other workers wait for so long; a change must reach every worker within half a second
PROBATION_S = 5.0  # late connect and first-token failures count too; then the Snapshot is the last good one
RETURNED_S = 2.0  # after a rollback: if as much fails as before it, the Snapshot was not the cause
RETRY_FIRST_S = 30.0  # so that a coincidence does not keep a good change out forever
RETRY_MAX_S = 600.0
BASELINE_MIN = 20  # successful requests before the change; without them a rollback gains nothing
FAILED_MIN = 10
RISE = 0.2
FACTOR = 2.0


class AttemptCounts(NamedTuple):
    """Requests that ended, and how many of them failed."""

    ended: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """The failed share, 0 if none ended."""
        return self.failed / self.ended if self.ended else 0.0

    def minus(self, earlier: "AttemptCounts") -> "AttemptCounts":
        """The counts since an earlier one."""
        return AttemptCounts(self.ended - earlier.ended, self.failed - earlier.failed)

    def plus(self, other: "AttemptCounts") -> "AttemptCounts":
        """The sum of both."""
        return AttemptCounts(self.ended + other.ended, self.failed + other.failed)


class CanaryStage(StrEnum):
    """The stage of a new Snapshot on its way to be the last good one."""

    LOOK = "look"  # used by the canary worker only
    PROBATION = "probation"  # used by every worker
    GOOD = "good"
    RETURNED = "returned"  # rolled back to the last good one; the result is being measured
    WAITING = "waiting"  # the rollback helped; the new Snapshot is tried again later
    CLEARED = "cleared"  # the rollback did not help: the new Snapshot is used again, without analysis


TRANSITIONS = {
    CanaryStage.LOOK: (CanaryStage.PROBATION, CanaryStage.RETURNED),
    CanaryStage.PROBATION: (CanaryStage.GOOD, CanaryStage.RETURNED),
    CanaryStage.RETURNED: (CanaryStage.WAITING, CanaryStage.CLEARED),
    CanaryStage.WAITING: (CanaryStage.LOOK,),
    CanaryStage.GOOD: (),
    CanaryStage.CLEARED: (),
}


class CanaryTrial(msgspec.Struct, frozen=True):
    """One Snapshot under analysis.

    Shape: `before` are the requests that ended in this worker shortly before the change, `before_all` in all workers;
    `own` and `others` are the counters of this worker and of all others when the stage began (in probation: when the
    look began); `bad` are the requests that ended under the new Snapshot until its rollback.
    """

    stage: CanaryStage
    since_s: float
    before: AttemptCounts
    before_all: AttemptCounts
    own: AttemptCounts
    others: AttemptCounts
    returns: int = 0
    bad: AttemptCounts = AttemptCounts()


def is_worse(since: AttemptCounts, before: AttemptCounts, others: AttemptCounts) -> bool:
    """Whether so much more fails than before the change and than in other workers that the change is the cause."""
    if before.ended - before.failed < BASELINE_MIN or since.failed < FAILED_MIN:
        return False
    return since.share > RISE + FACTOR * max(before.share, others.share)


def retry_after_s(returns: int) -> float:
    """How long a Snapshot waits for its next trial after so many rollbacks."""
    return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (returns - 1))


def next_stage(trial: CanaryTrial, own: AttemptCounts, others: AttemptCounts, now_s: float) -> CanaryTrial:
    """The trial after new counts; the same object while nothing is decided."""
    since, elsewhere, age_s = own.minus(trial.own), others.minus(trial.others), now_s - trial.since_s
    everywhere = since.plus(elsewhere)
    match trial.stage:
        case CanaryStage.LOOK if is_worse(since, trial.before, elsewhere):
            return _rolled_back(trial, own, others, now_s, since)
        case CanaryStage.PROBATION if is_worse(everywhere, trial.before_all, AttemptCounts()):
            # Every worker uses it, so there is no other worker to compare with.
            return _rolled_back(trial, own, others, now_s, everywhere)
        case CanaryStage.LOOK if age_s >= CANARY_S:
            return msgspec.structs.replace(trial, stage=CanaryStage.PROBATION)
        case CanaryStage.PROBATION if age_s >= PROBATION_S:
            return msgspec.structs.replace(trial, stage=CanaryStage.GOOD)
        case CanaryStage.RETURNED if _is_as_bad(since, trial.bad) or _is_as_bad(everywhere, trial.bad):
            return msgspec.structs.replace(trial, stage=CanaryStage.CLEARED)
        case CanaryStage.RETURNED if age_s >= RETURNED_S:
            return msgspec.structs.replace(trial, stage=CanaryStage.WAITING)
        case CanaryStage.WAITING if age_s >= retry_after_s(trial.returns):
            return msgspec.structs.replace(trial, stage=CanaryStage.LOOK, since_s=now_s, own=own, others=others)
        case _:
            return trial


def _rolled_back(
    trial: CanaryTrial, own: AttemptCounts, others: AttemptCounts, now_s: float, bad: AttemptCounts
) -> CanaryTrial:
    returns = trial.returns + 1
    return msgspec.structs.replace(
        trial, stage=CanaryStage.RETURNED, since_s=now_s, own=own, others=others, returns=returns, bad=bad
    )


def _is_as_bad(since: AttemptCounts, bad: AttemptCounts) -> bool:
    return since.failed >= FAILED_MIN and since.share >= bad.share / FACTOR
