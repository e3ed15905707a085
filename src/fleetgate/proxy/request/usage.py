"""Every attempt in the journal: an intent before it is sent, progress while it streams, a settlement at its end."""

from time import time
from typing import TYPE_CHECKING, NamedTuple

from fleetgate.core.exchange import Failure, Outcome
from fleetgate.ipc.usage_journal import UsageJournal
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.interface import UpstreamResponse

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler

HEDGED = b"hedged"  # the other attempt was first
STALE = b"stale"  # a kept connection was closed before anything came over it
_INTENT = b'{"t":"i","id":"%b","at_ms":%d,"key":%b,%b,%b}\n'
_PROGRESS = b'{"t":"p","id":"%b","prompt_tokens":%d,"output_tokens":%d}\n'
_SETTLEMENT = (
    b'{"t":"s","id":"%b","at_ms":%d,"outcome":"%b","prompt_tokens":%d,"output_tokens":%d,"exact":%d,'
    b'"billed_prompt_tokens":%d,"billed_output_tokens":%d,"bytes":%d}\n'
)
# An attempt that failed so has cost its engine nothing.
_IDLE = {each.value.encode() for each in (Failure.UNREACHABLE, Failure.TLS, Failure.FULL, Failure.CREDENTIAL)} | {
    Failure.MODEL_MISSING.value.encode()
}
_BILLED = (Outcome.OK, Outcome.CLIENT_GONE)
_OUTCOMES = {outcome: outcome.value.encode() for outcome in Outcome}
_FREE = {Outcome.CLIENT_ERROR, Outcome.REFUSED}
_OK = Outcome.OK  # a member read off its enum costs 70 ns each time


class TokenUsage(NamedTuple):
    """What an engine worked for an attempt. Shape: `exact` says that it told so itself, 0 that this is estimated."""

    prompt: int
    output: int
    exact: int


NOTHING = TokenUsage(0, 0, 1)


class PendingCharge(NamedTuple):
    """An attempt that broke off after its client had read some of it: another one may answer, or it stays at that.

    Only then is known whom to bill: what goes on elsewhere is billed as one answer. `billed` counts what was read.
    """

    attempt: bytes
    how: bytes
    worked: TokenUsage
    billed: tuple[int, int]


class UsageRecorder:
    """One worker's accounts. Cost: 1 µs when an attempt begins and when it is over."""

    def __init__(self, journal: UsageJournal) -> None:
        self._add = journal.add

    def begin(self, conversation: "RequestHandler", place: DeploymentState, attempt: bytes) -> None:
        """It is about to be sent: from here on it will have a row, whatever happens."""
        names = conversation.request.key_json, conversation.lane.log_names, place.log_names
        self._add(_INTENT % (attempt, time() * 1000, *names))

    def again(self, conversation: "RequestHandler", place: DeploymentState, attempt: bytes) -> bytes:
        """It is sent once more, because its connection was closed under it: the engine may have seen it or not."""
        self._settle(attempt, STALE, NOTHING, (0, 0), 0)
        attempt += b".2"
        self.begin(conversation, place, attempt)
        return attempt

    def progress(self, conversation: "RequestHandler", relay: UpstreamResponse) -> None:
        """How far a stream is, once its client reads what this attempt brings."""
        if conversation.owed is None:
            self._add(_PROGRESS % (conversation.attempt, _estimate(conversation), relay.event_count))

    def lost(self, conversation: "RequestHandler", attempt: bytes, relay: UpstreamResponse | None, how: bytes) -> None:
        """It is over and another one answers, or may: its client is billed nothing unless it read some of it."""
        worked = NOTHING if how in _IDLE else _worked(conversation, relay)
        if not conversation.first_s or conversation.owed is not None:
            self._settle(attempt, how, worked, (0, 0), 0)
            return
        billed = _read(conversation, relay)
        conversation.owed = PendingCharge(attempt, how, worked, billed)
        self._add(_PROGRESS % (attempt, *billed))

    def went_on(self, conversation: "RequestHandler") -> None:
        """Another attempt goes on with what one had begun, and is billed for both."""
        owed, conversation.owed = conversation.owed, None
        if owed is not None:
            self._settle(owed.attempt, owed.how, owed.worked, (0, 0), 0)

    def end(self, conversation: "RequestHandler", attempt: bytes, relay: UpstreamResponse | None) -> None:
        """The request is over, and so is the attempt, if one was in hand; what was read of another is billed now."""
        owed, outcome = conversation.owed, conversation.exchange.outcome or Outcome.FAILED
        size_bytes = conversation.written + len(conversation.tail)  # which is written when the books are done
        usage = relay.usage if relay is not None and relay.told is None else None
        if usage is not None and outcome is _OK and owed is None:  # as nearly all end: what follows says the same
            prompt, output = usage.prompt_tokens or usage.prompt, usage.completion_tokens or usage.output
            row = attempt, time() * 1000, b"ok", prompt, output, 1, prompt, output, size_bytes
            self._add(_SETTLEMENT % row)
            return
        if owed is not None:
            self._settle(owed.attempt, owed.how, owed.worked, owed.billed, size_bytes)
        if not attempt:
            return
        worked = NOTHING if outcome in _FREE else _worked(conversation, relay)
        if owed is None and outcome in _BILLED:
            self._settle(attempt, _OUTCOMES[outcome], worked, _read(conversation, relay), size_bytes)
        else:
            self._settle(attempt, _OUTCOMES[outcome], worked, (0, 0), 0)

    def _settle(self, attempt: bytes, how: bytes, worked: TokenUsage, billed: tuple[int, int], size_bytes: int) -> None:
        self._add(_SETTLEMENT % (attempt, time() * 1000, how, *worked, *billed, size_bytes))


def _worked(conversation: "RequestHandler", relay: UpstreamResponse | None) -> TokenUsage:
    """What this engine worked; one that goes on reads as its prompt what another had said."""
    if relay is None:
        return TokenUsage(_estimate(conversation), 0, 0)
    told = relay.told or relay.usage
    if told is not None:
        return TokenUsage(told.prompt, told.output, 1)
    said = relay.inherited
    return TokenUsage(_estimate(conversation) + said, relay.event_count - said if relay.stream else 0, 0)


def _read(conversation: "RequestHandler", relay: UpstreamResponse | None) -> tuple[int, int]:
    """What the client got of the answer as a whole, whoever said it."""
    if relay is None:
        return _estimate(conversation), 0
    usage = relay.usage
    if usage is not None:
        return usage.prompt, usage.output
    return _estimate(conversation), relay.event_count if relay.stream else 0


def _estimate(conversation: "RequestHandler") -> int:
    wanting = conversation.wanting
    if wanting is not None:
        return int(wanting.need.prompt_tokens)
    return int(conversation.hub.lengths.prompt_tokens(conversation.lane.model, len(conversation.body)))
