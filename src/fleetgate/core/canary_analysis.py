"""Is a new Snapshot to blame? One worker takes it first, and what fails before and after decides.

Only failures that nobody can have wanted count (our 5xx and streams that broke): a model or key that a change takes
away answers 404 or 401 by design.
"""

from enum import StrEnum
from typing import NamedTuple

import msgspec

CANARY_S = 0.2  # the others wait for so long; DESIGN.md gives a change half a second until every worker has it
PROBATION_S = 5.0  # connects and first tokens that fail late still count; then the Snapshot is the last good one
RETURNED_S = 2.0  # after going back: as bad as before means that the Snapshot was not to blame
RETRY_FIRST_S = 30.0  # a coincidence must not keep a good change out for ever
RETRY_MAX_S = 600.0
BASELINE_MIN = 20  # results that went well before; without them there is nothing to go back to
FAILED_MIN = 10
RISE = 0.2
FACTOR = 2.0


class AttemptCounts(NamedTuple):
    """Requests that ended, and how many of them failed through nobody's wish."""

    ended: int = 0
    failed: int = 0

    @property
    def share(self) -> float:
        """The failed share, 0 where nothing ended."""
        return self.failed / self.ended if self.ended else 0.0

    def minus(self, earlier: "AttemptCounts") -> "AttemptCounts":
        """What came after an earlier count."""
        return AttemptCounts(self.ended - earlier.ended, self.failed - earlier.failed)

    def plus(self, other: "AttemptCounts") -> "AttemptCounts":
        """Both together."""
        return AttemptCounts(self.ended + other.ended, self.failed + other.failed)


class CanaryStage(StrEnum):
    """Where a new Snapshot is on its way to being the last good one."""

    LOOK = "look"  # in the canary alone
    PROBATION = "probation"  # in every worker
    GOOD = "good"
    RETURNED = "returned"  # the last good one is in use again; did that help?
    WAITING = "waiting"  # it did, and the new one is tried again later
    CLEARED = "cleared"  # it did not: the new one is taken again, and not judged any more


TRANSITIONS = {
    CanaryStage.LOOK: (CanaryStage.PROBATION, CanaryStage.RETURNED),
    CanaryStage.PROBATION: (CanaryStage.GOOD, CanaryStage.RETURNED),
    CanaryStage.RETURNED: (CanaryStage.WAITING, CanaryStage.CLEARED),
    CanaryStage.WAITING: (CanaryStage.LOOK,),
    CanaryStage.GOOD: (),
    CanaryStage.CLEARED: (),
}


class CanaryTrial(msgspec.Struct, frozen=True):
    """One Snapshot on trial.

    Shape: `before` is what ended in this worker shortly before, `before_all` in all workers; `own` and `others` are the
    counts, of this worker and of all others, when the stage began (for a look and its probation: when the look began);
    `bad` is what ended under the new one when it was given up.
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
    """Whether so much more fails than before, and than elsewhere, that the change is to blame."""
    if before.ended - before.failed < BASELINE_MIN or since.failed < FAILED_MIN:
        return False
    return since.share > RISE + FACTOR * max(before.share, others.share)


def retry_after_s(returns: int) -> float:
    """How long a Snapshot that was returned from waits for its next trial."""
    return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (returns - 1))


def next_stage(trial: CanaryTrial, own: AttemptCounts, others: AttemptCounts, now_s: float) -> CanaryTrial:
    """The trial after a look at the counts; the same one while nothing is decided."""
    since, elsewhere, age_s = own.minus(trial.own), others.minus(trial.others), now_s - trial.since_s
    everywhere = since.plus(elsewhere)
    match trial.stage:
        case CanaryStage.LOOK if is_worse(since, trial.before, elsewhere):
            return _given_up(trial, own, others, now_s, since)
        case CanaryStage.PROBATION if is_worse(everywhere, trial.before_all, AttemptCounts()):
            # All have it, so there is nobody left to compare with.
            return _given_up(trial, own, others, now_s, everywhere)
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


def _given_up(
    trial: CanaryTrial, own: AttemptCounts, others: AttemptCounts, now_s: float, bad: AttemptCounts
) -> CanaryTrial:
    returns = trial.returns + 1
    return msgspec.structs.replace(
        trial, stage=CanaryStage.RETURNED, since_s=now_s, own=own, others=others, returns=returns, bad=bad
    )


def _is_as_bad(since: AttemptCounts, bad: AttemptCounts) -> bool:
    return since.failed >= FAILED_MIN and since.share >= bad.share / FACTOR
