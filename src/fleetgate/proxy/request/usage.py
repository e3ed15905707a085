"""Writes attempts to the usage journal: an intent before sending, progress in the stream, a settlement at the end."""

from collections.abc import Callable
from time import time
from typing import NamedTuple

import msgspec

from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import Failure, Outcome
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.transport.interface import UpstreamResponse

HEDGED = b"hedged"  # the other attempt was faster
STALE = b"stale"  # a kept connection was closed before anything came over it
_INTENT = b'{"t":"i","id":"%b","at_ms":%d,"key":%b,%b,%b}\n'
_PROGRESS = b'{"t":"p","id":"%b","prompt_tokens":%d,"output_tokens":%d}\n'
_SETTLEMENT = (
    b'{"t":"s","id":"%b","at_ms":%d,"outcome":"%b","prompt_tokens":%d,"output_tokens":%d,"exact":%d,'
    b'"billed_prompt_tokens":%d,"billed_output_tokens":%d,"bytes":%d}\n'
)
# Failures that cost the engine nothing.
_NO_WORK = {each.value.encode() for each in (Failure.UNREACHABLE, Failure.TLS, Failure.FULL, Failure.CREDENTIAL)} | {
    Failure.MODEL_MISSING.value.encode()
}
_BILLED = (Outcome.OK, Outcome.CLIENT_GONE)
_OUTCOMES = {outcome: outcome.value.encode() for outcome in Outcome}
_FREE = {Outcome.CLIENT_ERROR, Outcome.REFUSED}
_OK = Outcome.OK  # a member read off its enum costs 70 ns each time


class TokenUsage(NamedTuple):
    """Tokens that an engine processed for an attempt. Shape: `exact` is 1 if the engine reported it, else 0."""

    prompt: int
    output: int
    exact: int


NOTHING = TokenUsage(0, 0, 1)


class PendingCharge(NamedTuple):
    """The charge of an attempt that broke off after its client had read some of it.

    It is charged when it is known whether another attempt resumes the response, which is then billed as one. `billed`
    counts what was read.
    """

    attempt_id: bytes
    how: bytes
    worked: TokenUsage
    billed: tuple[int, int]


class UsageRecorder(msgspec.Struct, eq=False):
    """Records the usage of one request. A Struct, so that making one costs no call.

    Cost: 1 µs when an attempt begins and when it is over.
    Shape: `add` appends a line to the journal; `names` are the JSON members for key and route; `estimates`, `model` and
    `body_bytes` estimate the prompt if no engine reports it.
    """

    add: Callable[[bytes], None]
    names: tuple[bytes, bytes]
    estimates: TokenEstimates
    model: str
    body_bytes: int
    pending: PendingCharge | None = None

    def begin(self, deployment: DeploymentState, attempt_id: bytes) -> None:
        """Record the intent before an attempt is sent: from now on it will have a row, whatever happens."""
        self.add(_INTENT % (attempt_id, time() * 1000, *self.names, deployment.log_names))

    def begin_again(self, deployment: DeploymentState, attempt_id: bytes) -> bytes:
        """Record that it is sent again on a new connection: the engine may have seen both. Returns the new id."""
        self._settle(attempt_id, STALE, NOTHING, (0, 0), 0)
        attempt_id += b".2"
        self.begin(deployment, attempt_id)
        return attempt_id

    def progress(self, attempt_id: bytes, response: UpstreamResponse) -> None:
        """Record the progress of a stream, once its client reads this attempt."""
        if self.pending is None:
            self.add(_PROGRESS % (attempt_id, self._prompt_tokens(), response.event_count))

    def lost(self, attempt_id: bytes, response: UpstreamResponse | None, how: bytes, was_read: bool) -> None:
        """Settle an attempt while the request continues: the client is billed only for the part that it has read."""
        worked = NOTHING if how in _NO_WORK else self._worked(response)
        if not was_read or self.pending is not None:
            self._settle(attempt_id, how, worked, (0, 0), 0)
            return
        billed = self._read(response)
        self.pending = PendingCharge(attempt_id, how, worked, billed)
        self.add(_PROGRESS % (attempt_id, *billed))

    def resumed(self) -> None:
        """Move the pending charge to the attempt that resumes the response."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self._settle(pending.attempt_id, pending.how, pending.worked, (0, 0), 0)

    def end(self, attempt_id: bytes, response: UpstreamResponse | None, outcome: Outcome, size_bytes: int) -> None:
        """Settle the current attempt, if there is one, at the end of the request; a pending charge is billed now."""
        pending = self.pending
        usage = response.usage if response is not None and response.own_usage is None else None
        if (
            usage is not None and outcome is _OK and pending is None
        ):  # the usual end: a faster way to the same result as below
            prompt, output = usage.prompt_tokens or usage.prompt, usage.completion_tokens or usage.output
            row = attempt_id, time() * 1000, b"ok", prompt, output, 1, prompt, output, size_bytes
            self.add(_SETTLEMENT % row)
            return
        if pending is not None:
            self._settle(pending.attempt_id, pending.how, pending.worked, pending.billed, size_bytes)
        if not attempt_id:
            return
        worked = NOTHING if outcome in _FREE else self._worked(response)
        if pending is None and outcome in _BILLED:
            self._settle(attempt_id, _OUTCOMES[outcome], worked, self._read(response), size_bytes)
        else:
            self._settle(attempt_id, _OUTCOMES[outcome], worked, (0, 0), 0)

    def _prompt_tokens(self) -> int:
        return int(self.estimates.prompt_tokens(self.model, self.body_bytes))

    def _settle(
        self, attempt_id: bytes, how: bytes, worked: TokenUsage, billed: tuple[int, int], size_bytes: int
    ) -> None:
        self.add(_SETTLEMENT % (attempt_id, time() * 1000, how, *worked, *billed, size_bytes))

    def _worked(self, response: UpstreamResponse | None) -> TokenUsage:
        """The tokens of this engine. The prompt of a resuming engine includes the other's output."""
        if response is None:
            return TokenUsage(self._prompt_tokens(), 0, 0)
        reported = response.own_usage or response.usage
        if reported is not None:
            return TokenUsage(reported.prompt, reported.output, 1)
        inherited = response.inherited
        output = response.event_count - inherited if response.stream else 0
        return TokenUsage(self._prompt_tokens() + inherited, output, 0)

    def _read(self, response: UpstreamResponse | None) -> tuple[int, int]:
        """The tokens of the response that the client got, from all engines."""
        if response is None:
            return self._prompt_tokens(), 0
        usage = response.usage
        if usage is not None:
            return usage.prompt, usage.output
        return self._prompt_tokens(), response.event_count if response.stream else 0
