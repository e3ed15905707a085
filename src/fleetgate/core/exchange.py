"""The life of one request, from the first decision to the last byte, as a table of legal transitions.

The caller reports what happened (`receive`) and carries out the Command that it gets back. Until the commit point, the
first content event sent to the client, a failure moves the request to another Deployment and the client sees nothing.
After it, a response that can be resumed goes through the same states again while its client waits inside the stream.
"""

from collections.abc import Callable
from enum import IntEnum, StrEnum

import msgspec

from fleetgate.core.admission.retry_budget import KeyBudget, RetryBudget
from fleetgate.core.routing.route import RejectionReason
from fleetgate.core.routing.strategies import Candidate

RETRY_AFTER_MAX_S = 60.0  # official SDKs wait no longer than 120 s, and the client may need the response sooner
RETRY_AFTER_NONE_UP_S = 5.0
RETRY_AFTER_FULL_S = 1.0
RESUMES_MAX = 2  # of one response; another failure after that interrupts it


class State(IntEnum):
    """The state of a request. Integers, because a plain Enum is hashed in Python and every transition is a look-up."""

    PICKING = 0
    WAITING = 1
    TRYING = 2
    COMMITTED = 3
    ENDED = 4


class Failure(StrEnum):
    """How an attempt failed: the first four are the classes of failure, the others say more about the cause."""

    FULL = "full"
    BROKEN = "broken"
    BAD_OUTPUT = "bad_output"
    POISON = "poison"
    UNREACHABLE = "unreachable"  # broken before the request was sent: refused, no answer, no address
    TIMEOUT = "timeout"  # broken: sent, and no content event in time
    TLS = "tls"
    CREDENTIAL = "credential"  # the engine refused our credential, not the client's key
    MODEL_MISSING = "model_missing"
    MISMATCH = "mismatch"  # a resumed response does not continue the first one; neither Deployment is at fault


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
    """Capacity was reserved at this candidate."""

    candidate: Candidate


class NotPicked(msgspec.Struct, frozen=True):
    """No Deployment can take the request."""

    reason: RejectionReason


class QueueFull(msgspec.Struct, frozen=True):
    """The request queue is full."""


class CapacityFreed(msgspec.Struct, frozen=True):
    """Capacity is free, and this request is next."""


class QueueTimeout(msgspec.Struct, frozen=True):
    """The request reached its deadline in the queue. Units: `retry_after_s` from the measured drain rate."""

    retry_after_s: float = RETRY_AFTER_FULL_S


class Content(msgspec.Struct, frozen=True):
    """The first content event, or the whole body of an unstreamed response, is here. Shape: `status` is upstream's."""

    status: int = 200


class AttemptFailed(msgspec.Struct, frozen=True):
    """The current attempt is lost.

    Units: `wait_s` is the pause that the engine asked for, 0 if it did not.
    Shape: `sent` says whether the request had been sent, `resumable` whether a partly sent response can continue at
    another Deployment.
    """

    failure: Failure
    sent: bool = True
    retry_after_s: float = 0.0
    resumable: bool = False
    wait_s: float = 0.0


class Finished(msgspec.Struct, frozen=True):
    """The response is complete."""


class ClientGone(msgspec.Struct, frozen=True):
    """The client left, or the request is ended as if it had. Shape: `outcome` is how it counts."""

    outcome: Outcome = Outcome.CLIENT_GONE


Event = Picked | NotPicked | QueueFull | CapacityFreed | QueueTimeout | Content | AttemptFailed | Finished | ClientGone

# --- commands ---------------------------------------------------------------------------------------------------------


class Pick(msgspec.Struct, frozen=True):
    """Route the request and reserve capacity, without the Deployments of these slots."""

    tried: tuple[int, ...] = ()


class Wait(msgspec.Struct, frozen=True):
    """Wait in the request queue."""


class Send(msgspec.Struct, frozen=True):
    """Send the request to this candidate and hold its response back until the first content event."""

    candidate: Candidate


class Commit(msgspec.Struct, frozen=True):
    """Send the held response to the client and relay the rest."""


class Continue(msgspec.Struct, frozen=True):
    """Continue the response with what this Deployment sends."""


class Refuse(msgspec.Struct, frozen=True):
    """Answer with an error. Shape: `should_retry` is for SDKs that retry by themselves; None leaves it to them."""

    status: int
    code: str
    retry_after_s: float = 0.0
    should_retry: bool | None = None


class Interrupt(msgspec.Struct, frozen=True):
    """Send an error event inside the stream, then abort the connection: a cut response must not end cleanly."""

    failure: Failure


class Finish(msgspec.Struct, frozen=True):
    """Nothing more to do. Shape: `outcome` is for metrics and usage."""

    outcome: Outcome


Command = Pick | Wait | Send | Commit | Continue | Refuse | Interrupt | Finish

# A member read from its enum costs 70 ns each time, a module-level name 5 ns.
_PICKING, _WAITING, _TRYING, _COMMITTED, _ENDED = State
_OK, _CLIENT_ERROR = Outcome.OK, Outcome.CLIENT_ERROR

COMMIT = Commit()
CONTINUE = Continue()
WAIT = Wait()
PICK = Pick()
FINISHED = Finished()
CLIENT_GONE = ClientGone()


class IllegalTransition(RuntimeError):
    """The caller reported an event that cannot happen in this state: a bug, not a fault."""


class Exchange:
    """The life of one request.

    Shape: `tried` are the slots of the Deployments tried; `moves` counts moves to another Deployment, `resumes` those
    after the commit point.
    Cost: about 1 µs for the four transitions of a request without faults.
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
        self._client_retries = client_retries  # from x-stainless-retry-count: the SDK retries already
        self.state = _PICKING
        self.tried: tuple[int, ...] = ()
        self.failures: tuple[AttemptFailed, ...] = ()
        self.attempts_sent = 0
        self.moves = 0
        self.resumes = 0  # from the first one on, a failure ends a response and not only a request
        self.outcome: Outcome | None = None

    def start(self) -> Pick:
        """The first command."""
        if self._client_retries:
            self._budget.record_client_retry()
        else:
            self._budget.record_request()
        return PICK

    def record_hedge(self, candidate: Candidate) -> None:
        """Count a second attempt beside the current one. It makes no difference which of them brings content."""
        self.tried = (*self.tried, candidate.slot)
        self.attempts_sent += 1

    def record_move(self) -> None:
        """Count a second attempt beside the current one as a move: it was sent because the first is late."""
        self.moves += 1

    def record_failure(self, event: AttemptFailed) -> None:
        """Keep a lost attempt for the refusal, while another one goes on in its place."""
        self.failures = (*self.failures, event)

    def record_unsent(self) -> None:
        """Uncount an attempt that was given up before its request was sent."""
        self.attempts_sent -= 1

    def receive(self, event: Event, now_s: float) -> Command:
        """Take an event and return what to do.

        Raises: `IllegalTransition` if the table has no such transition.
        """
        transition = TRANSITIONS.get((self.state, type(event)))
        if transition is None:
            raise IllegalTransition(f"{type(event).__name__} in state {self.state.name}")
        command: Command = transition(self, event, now_s)
        return command

    # The methods below are called through TRANSITIONS only.

    def _send(self, event: Picked, now_s: float) -> Command:
        self.state = _TRYING
        self.tried = (*self.tried, event.candidate.slot)
        self.attempts_sent += 1
        return Send(event.candidate)

    def _not_picked(self, event: NotPicked, now_s: float) -> Command:
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

    def _queue_timeout(self, event: QueueTimeout, now_s: float) -> Command:
        return self._refuse(Refuse(429, "capacity_exhausted", min(event.retry_after_s, RETRY_AFTER_MAX_S)))

    def _capacity_freed(self, event: CapacityFreed, now_s: float) -> Command:
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
            return self._interrupt(event.failure)
        if event.failure is Failure.POISON or self.attempts_sent >= self._attempts_max:
            return self._refuse(final_refusal(self.failures, self._client_retries))
        # A first move only carries load elsewhere. Further moves, and those of a client that retries by itself, would
        # multiply the load of a total outage, so they need the budget.
        if (self.moves or self._client_retries) and not self._budget.take(now_s):
            return self._refuse(final_refusal(self.failures, self._client_retries))
        self.moves += 1
        self.state = _PICKING
        return Pick(self.tried)

    def _resume(self, event: AttemptFailed, now_s: float) -> Command:
        """The response broke off after the commit point."""
        self.failures = (*self.failures, event)
        if not event.resumable or self.resumes >= RESUMES_MAX:
            return self._interrupt(event.failure)
        # As with moves: a first resume only carries load elsewhere, a second one would multiply an outage.
        if self.resumes and not self._budget.take(now_s):
            return self._interrupt(event.failure)
        self.resumes += 1
        self.moves += 1
        self.attempts_sent = 0
        self.state = _PICKING
        return Pick(self.tried)

    def _finish(self, event: Finished, now_s: float) -> Command:
        self.state = _ENDED
        return Finish(self.outcome or _OK)

    def _client_gone(self, event: ClientGone, now_s: float) -> Command:
        self.state = _ENDED
        self.outcome = event.outcome
        return Finish(event.outcome)

    def _interrupt(self, failure: Failure) -> Interrupt:
        self.state = _ENDED
        self.outcome = Outcome.INTERRUPTED
        return Interrupt(failure)

    def _refuse(self, refusal: Refuse) -> Refuse | Interrupt:
        if self.resumes:  # the client has a part of the response, so no status can be sent
            return self._interrupt(self.failures[-1].failure)
        self.state = _ENDED
        self.outcome = Outcome.REFUSED if refusal.status in (429, 503) else Outcome.FAILED
        return refusal


# Each method takes the event type of its row, which a plain Callable type cannot express.
TRANSITIONS: dict[tuple[State, type], Callable[..., Command]] = {
    (State.PICKING, Picked): Exchange._send,
    (State.PICKING, NotPicked): Exchange._not_picked,
    (State.PICKING, ClientGone): Exchange._client_gone,
    (State.WAITING, CapacityFreed): Exchange._capacity_freed,
    (State.WAITING, QueueFull): Exchange._queue_full,
    (State.WAITING, QueueTimeout): Exchange._queue_timeout,
    (State.WAITING, ClientGone): Exchange._client_gone,
    (State.TRYING, Content): Exchange._commit,
    (State.TRYING, AttemptFailed): Exchange._move,
    (State.TRYING, ClientGone): Exchange._client_gone,
    (State.COMMITTED, Finished): Exchange._finish,
    (State.COMMITTED, AttemptFailed): Exchange._resume,
    (State.COMMITTED, ClientGone): Exchange._client_gone,
}


def final_refusal(failures: tuple[AttemptFailed, ...], client_retries: int) -> Refuse:
    """The one error that a client gets after its attempts: a cause it can act on has precedence."""
    kinds = {lost.failure for lost in failures}
    if kinds == {Failure.MODEL_MISSING}:
        return Refuse(404, "model_not_found")
    if Failure.FULL in kinds:
        waits = [lost.retry_after_s for lost in failures if lost.failure is Failure.FULL]
        return Refuse(429, "capacity_exhausted", min(max(min(waits), RETRY_AFTER_FULL_S), RETRY_AFTER_MAX_S))
    # Every region failed. An SDK may retry its first call once; more retries would multiply the outage.
    should_retry = client_retries == 0
    if Failure.POISON in kinds:
        return Refuse(502, "poison_request", should_retry=False)
    if kinds == {Failure.UNREACHABLE}:
        return Refuse(503, "no_deployment_available", RETRY_AFTER_NONE_UP_S, should_retry=should_retry)
    if kinds == {Failure.CREDENTIAL}:
        return Refuse(502, "upstream_auth_error", should_retry=False)
    if kinds == {Failure.TLS}:
        return Refuse(502, "upstream_tls_error", should_retry=False)
    if failures[-1].failure is Failure.TIMEOUT:
        return Refuse(504, "upstream_timeout", should_retry=should_retry)
    return Refuse(502, "upstream_error", should_retry=should_retry)
