"""One request's life, from the first pick to the last byte, as a table of legal moves.

The shell reports what happened (`receive`) and does what it is told (a Command). Until the commit point, which is the
first content event sent to the client, any failure moves the request to another Deployment and the client sees nothing.
After it, an answer that can be resumed goes through the same states again; its client waits inside the stream.
"""

from collections.abc import Callable
from enum import IntEnum, StrEnum

import msgspec

from fleetgate.core.admission.retry_budget import KeyBudget, RetryBudget
from fleetgate.core.routing.route import RejectionReason
from fleetgate.core.routing.strategies import Candidate

RETRY_AFTER_MAX_S = 60.0  # official SDKs do not wait longer than 120 s, and a client should come back while it cares
RETRY_AFTER_NONE_UP_S = 5.0
RETRY_AFTER_FULL_S = 1.0
RESUMES_MAX = 2  # FAULTS.md section 2


class State(IntEnum):
    """Where a request is. Integers, because a plain Enum is hashed in Python and every move is a look-up."""

    PICKING = 0
    WAITING = 1
    TRYING = 2
    COMMITTED = 3
    ENDED = 4


class Failure(StrEnum):
    """How an attempt failed. The first four are DESIGN's classes; the others say whose fault it was."""

    FULL = "full"
    BROKEN = "broken"
    BAD_OUTPUT = "bad_output"
    POISON = "poison"
    UNREACHABLE = "unreachable"  # broken before the request was sent: refused, blackholed, no address
    TIMEOUT = "timeout"  # broken: sent, and no content event in time
    TLS = "tls"
    CREDENTIAL = "credential"  # the engine refused our credential, not the client's key
    MODEL_MISSING = "model_missing"
    MISMATCH = "mismatch"  # another Deployment's answer is another one: nobody's fault


class Outcome(StrEnum):
    """How a request ended, for metrics and the access log."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    REFUSED = "refused"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CLIENT_GONE = "client_gone"


# --- events -----------------------------------------------------------------------------------------------------------


class Picked(msgspec.Struct, frozen=True):
    """A place was reserved at this candidate."""

    candidate: Candidate


class NotPicked(msgspec.Struct, frozen=True):
    """Nobody could take it."""

    reason: RejectionReason


class QueueFull(msgspec.Struct, frozen=True):
    """There was no place left to wait in."""


class CapacityFreed(msgspec.Struct, frozen=True):
    """It is this request's turn again to look for a place."""


class QueueTimeout(msgspec.Struct, frozen=True):
    """It has waited as long as it may. Units: `retry_after_s` from the measured drain rate."""

    retry_after_s: float = RETRY_AFTER_FULL_S


class Content(msgspec.Struct, frozen=True):
    """The first content event (or the whole unstreamed body) is here; `status` is the upstream's."""

    status: int = 200


class AttemptFailed(msgspec.Struct, frozen=True):
    """The attempt in hand is lost.

    `sent` says whether the request had been sent, `resumable` whether an answer half-way out can go on elsewhere.
    Units: `wait_s` is how long its engine asked to be left alone, 0 where it did not say.
    """

    failure: Failure
    sent: bool = True
    retry_after_s: float = 0.0
    resumable: bool = False
    wait_s: float = 0.0


class Finished(msgspec.Struct, frozen=True):
    """The answer has ended as an answer should."""


class ClientGone(msgspec.Struct, frozen=True):
    """The client left, or we end it as if it had: `outcome` is how it counts."""

    outcome: Outcome = Outcome.CLIENT_GONE


Event = Picked | NotPicked | QueueFull | CapacityFreed | QueueTimeout | Content | AttemptFailed | Finished | ClientGone

# --- commands ---------------------------------------------------------------------------------------------------------


class Pick(msgspec.Struct, frozen=True):
    """Route and reserve, leaving out the Deployments of these slots."""

    tried: tuple[int, ...] = ()


class Wait(msgspec.Struct, frozen=True):
    """Wait for room."""


class Send(msgspec.Struct, frozen=True):
    """Send the request to this candidate and peek until its first content event."""

    candidate: Candidate


class Commit(msgspec.Struct, frozen=True):
    """Send what was held back and relay the rest."""


class Continue(msgspec.Struct, frozen=True):
    """The answer goes on from another Deployment."""


class Refuse(msgspec.Struct, frozen=True):
    """Answer with an error. `should_retry` is for SDKs that retry by themselves; None leaves it to them."""

    status: int
    code: str
    retry_after_s: float = 0.0
    should_retry: bool | None = None


class Interrupt(msgspec.Struct, frozen=True):
    """Say inside the stream that it broke, then abort the connection: never a clean end of an unfinished answer."""

    failure: Failure


class Finish(msgspec.Struct, frozen=True):
    """Nothing more to do; the outcome is for the books."""

    outcome: Outcome


Command = Pick | Wait | Send | Commit | Continue | Refuse | Interrupt | Finish

# A member read off its enum costs 70 ns each time, a name of this module 5.
_PICKING, _WAITING, _TRYING, _COMMITTED, _ENDED = State
_OK, _CLIENT_ERROR = Outcome.OK, Outcome.CLIENT_ERROR

COMMIT = Commit()
CONTINUE = Continue()
WAIT = Wait()
PICK = Pick()
FINISHED = Finished()
CLIENT_GONE = ClientGone()


class IllegalTransition(RuntimeError):
    """The shell reported an event that cannot happen in this state: a bug, not a fault."""


class Exchange:
    """One request's life.

    Cost: about 1 µs for the four moves of a request that nothing happens to.
    """

    __slots__ = (
        "_attempts_max",
        "_budget",
        "_client_retries",
        "attempts_sent",
        "failures",
        "moves",
        "outcome",
        "resumes",
        "state",
        "tried",
    )

    def __init__(self, attempts_max: int, budget: RetryBudget | KeyBudget, client_retries: int = 0) -> None:
        self._attempts_max = attempts_max
        self._budget = budget
        self._client_retries = client_retries  # x-stainless-retry-count: the SDK is already retrying
        self.state = _PICKING
        self.tried: tuple[int, ...] = ()
        self.failures: tuple[AttemptFailed, ...] = ()
        self.attempts_sent = 0
        self.moves = 0
        self.resumes = 0  # from the first on, what fails is an answer, and no longer a request
        self.outcome: Outcome | None = None

    def start(self) -> Pick:
        """The first command."""
        if self._client_retries:
            self._budget.record_client_retry()
        else:
            self._budget.record_request()
        return PICK

    def record_hedge(self, candidate: Candidate) -> None:
        """A second attempt runs beside the one in hand; which of them it is that brings content makes no difference."""
        self.tried = (*self.tried, candidate.slot)
        self.attempts_sent += 1

    def record_unsent(self) -> None:
        """One of two attempts was given up before its request went out, so that it counts against no bound."""
        self.attempts_sent -= 1

    def receive(self, event: Event, now_s: float) -> Command:
        """What to do now that this happened.

        Raises: `IllegalTransition` where the table has no such move.
        """
        move = TRANSITIONS.get((self.state, type(event)))
        if move is None:
            raise IllegalTransition(f"{type(event).__name__} in state {self.state.name}")
        command: Command = move(self, event, now_s)
        return command

    # Each move below is named in TRANSITIONS; none is called from elsewhere.

    def _send(self, event: Picked, now_s: float) -> Command:
        self.state = _TRYING
        self.tried = (*self.tried, event.candidate.slot)
        self.attempts_sent += 1
        return Send(event.candidate)

    def _no_place(self, event: NotPicked, now_s: float) -> Command:
        if event.reason is RejectionReason.ALL_FULL or event.reason is RejectionReason.ON_TRIAL:
            self.state = _WAITING
            return WAIT
        if event.reason is RejectionReason.DENIED:
            return self._refuse(Refuse(502, "upstream_auth_error", should_retry=False))
        if self.failures:
            return self._refuse(final_refusal(self.failures, self._client_retries))
        return self._refuse(
            Refuse(503, "no_deployment_available", RETRY_AFTER_NONE_UP_S, should_retry=not self._client_retries)
        )

    def _queue_full(self, event: QueueFull, now_s: float) -> Command:
        return self._refuse(Refuse(429, "queue_full", RETRY_AFTER_FULL_S))

    def _overdue(self, event: QueueTimeout, now_s: float) -> Command:
        return self._refuse(Refuse(429, "capacity_exhausted", min(event.retry_after_s, RETRY_AFTER_MAX_S)))

    def _pick_again(self, event: CapacityFreed, now_s: float) -> Command:
        self.state = _PICKING
        return Pick(self.tried)

    def _commit(self, event: Content, now_s: float) -> Command:
        self.state = _COMMITTED
        if self.resumes:
            return CONTINUE
        self.outcome = _OK if event.status < 400 else _CLIENT_ERROR
        return COMMIT

    def _move(self, event: AttemptFailed, now_s: float) -> Command:
        self.failures = (*self.failures, event)
        if not event.sent:
            self.attempts_sent -= 1
        if self.resumes and not event.resumable:
            return self._break_off(event.failure)
        if event.failure is Failure.POISON or self.attempts_sent >= self._attempts_max:
            return self._refuse(final_refusal(self.failures, self._client_retries))
        # The first move carries load elsewhere and multiplies nothing; from the second on a total outage would,
        # and so would those of a client that retries by itself.
        if (self.moves or self._client_retries) and not self._budget.take(now_s):
            return self._refuse(final_refusal(self.failures, self._client_retries))
        self.moves += 1
        self.state = _PICKING
        return Pick(self.tried)

    def _lose(self, event: AttemptFailed, now_s: float) -> Command:
        """The answer broke off half-way."""
        self.failures = (*self.failures, event)
        if not event.resumable or self.resumes >= RESUMES_MAX:
            return self._break_off(event.failure)
        # The first resume carries load elsewhere, as a first move does; a second one would multiply an outage.
        if self.resumes and not self._budget.take(now_s):
            return self._break_off(event.failure)
        self.resumes += 1
        self.moves += 1
        self.attempts_sent = 0
        self.state = _PICKING
        return Pick(self.tried)

    def _finish(self, event: Finished, now_s: float) -> Command:
        self.state = _ENDED
        return Finish(self.outcome or _OK)

    def _leave(self, event: ClientGone, now_s: float) -> Command:
        self.state = _ENDED
        self.outcome = event.outcome
        return Finish(event.outcome)

    def _break_off(self, failure: Failure) -> Interrupt:
        self.state = _ENDED
        self.outcome = Outcome.INTERRUPTED
        return Interrupt(failure)

    def _refuse(self, refusal: Refuse) -> Refuse | Interrupt:
        if self.resumes:  # its client has a half answer already, and no status can be sent any more
            return self._break_off(self.failures[-1].failure)
        self.state = _ENDED
        self.outcome = Outcome.REFUSED if refusal.status in (429, 503) else Outcome.FAILED
        return refusal


# Each move takes the event type it is listed under, which a plain Callable type cannot say.
TRANSITIONS: dict[tuple[State, type], Callable[..., Command]] = {
    (State.PICKING, Picked): Exchange._send,
    (State.PICKING, NotPicked): Exchange._no_place,
    (State.PICKING, ClientGone): Exchange._leave,
    (State.WAITING, CapacityFreed): Exchange._pick_again,
    (State.WAITING, QueueFull): Exchange._queue_full,
    (State.WAITING, QueueTimeout): Exchange._overdue,
    (State.WAITING, ClientGone): Exchange._leave,
    (State.TRYING, Content): Exchange._commit,
    (State.TRYING, AttemptFailed): Exchange._move,
    (State.TRYING, ClientGone): Exchange._leave,
    (State.COMMITTED, Finished): Exchange._finish,
    (State.COMMITTED, AttemptFailed): Exchange._lose,
    (State.COMMITTED, ClientGone): Exchange._leave,
}


def final_refusal(failures: tuple[AttemptFailed, ...], client_retries: int) -> Refuse:
    """The one error a client sees after its attempts: what it can act on goes before what only we can."""
    kinds = {failed.failure for failed in failures}
    if kinds == {Failure.MODEL_MISSING}:
        return Refuse(404, "model_not_found")
    if Failure.FULL in kinds:
        waits = [failed.retry_after_s for failed in failures if failed.failure is Failure.FULL]
        return Refuse(429, "capacity_exhausted", min(max(min(waits), RETRY_AFTER_FULL_S), RETRY_AFTER_MAX_S))
    # Every region was asked. An SDK's first call may come back once; its retries would only multiply the outage.
    again = client_retries == 0
    if Failure.POISON in kinds:
        return Refuse(502, "poison_request", should_retry=False)
    if kinds == {Failure.UNREACHABLE}:
        return Refuse(503, "no_deployment_available", RETRY_AFTER_NONE_UP_S, should_retry=again)
    if kinds == {Failure.CREDENTIAL}:
        return Refuse(502, "upstream_auth_error", should_retry=False)
    if kinds == {Failure.TLS}:
        return Refuse(502, "upstream_tls_error", should_retry=False)
    if failures[-1].failure is Failure.TIMEOUT:
        return Refuse(504, "upstream_timeout", should_retry=again)
    return Refuse(502, "upstream_error", should_retry=again)
