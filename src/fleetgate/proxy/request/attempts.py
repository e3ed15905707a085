"""The attempts of one request, at most two at a time, and what their results show about Endpoints."""

from asyncio import Task
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.core.health.poison_request import is_poison
from fleetgate.ipc.shared_memory import DeploymentCounter
from fleetgate.proxy.health.passive_health import FailedAttempt, PassiveHealthChecker
from fleetgate.proxy.health.poison_detector import PoisonDetector
from fleetgate.proxy.request import deadlines
from fleetgate.proxy.request.attempt import Attempt, AttemptServices, CarriedRequest
from fleetgate.proxy.request.outcome import OutcomeRecorder
from fleetgate.proxy.request.placement import RETRY_AFTER_IN_PLACE_MAX_S, PlacedRequest
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import CapacityAccounts
from fleetgate.proxy.request.resume import Resume
from fleetgate.proxy.request.usage import HEDGED, UsageRecorder
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.transport.interface import UpstreamResponse

BAD_REQUEST = 400
_REFUSED = int(DeploymentCounter.REFUSED)
_FULL, _BROKEN, _UNREACHABLE = Failure.FULL, Failure.BROKEN, Failure.UNREACHABLE


class AttemptEffects(msgspec.Struct, frozen=True):
    """The services that lost attempts report to: health, poison detection, counters and records."""

    health: PassiveHealthChecker
    poison: PoisonDetector
    accounts: CapacityAccounts
    outcomes: OutcomeRecorder


class AttemptOwner(Protocol):
    """The request that attempts report to."""

    def on_content(self, response: UpstreamResponse) -> None:
        """The first content came."""

    def on_lost(self, event: AttemptFailed) -> None:
        """The current attempt is lost."""

    def on_answered(self, response: UpstreamResponse, tail: bytes) -> None:
        """The response ended well; `tail` is the end of its framing."""

    def on_verdict(self, event: AttemptFailed) -> None:
        """The check of a loss is done: the engines failed, or the request is poison."""

    def on_dial_slow(self) -> None:
        """The current attempt takes unusually long to connect."""

    def on_internal_error(self, error: BaseException) -> None:
        """An internal error happened in an attempt."""

    def on_one_given_up(self, is_adopted: bool) -> None:
        """One of two attempts was cancelled before it was sent; `is_adopted` if the second one continues."""


class AttemptSet(msgspec.Struct, eq=False):
    """The attempts of one request, and the listener of their responses. A Struct, so that making one costs no call.

    Shape: `current` is the main attempt, `hedge` a second one beside it; `last` is the latest, kept for records after
    its settlement; `count` counts sent attempts; `failed` are Endpoints that failed this request; `was_read` says
    that content was sent to the client. `write`, `now_s` and `on_ended` are functions of the owner and the clock,
    stored here to save a call each.
    """

    services: AttemptServices
    effects: AttemptEffects
    id: bytes
    received: ReceivedRequest
    usage: UsageRecorder
    owner: AttemptOwner
    write: Callable[[bytes], None]
    now_s: Callable[[], float]
    on_ended: Callable[[UpstreamResponse, bytes], None]
    current: Attempt | None = None
    hedge: Attempt | None = None
    last: Attempt | None = None
    resume: Resume | None = None  # once the response broke off and is resumed elsewhere
    failed: tuple[EndpointState, ...] = ()
    count: int = 0
    was_read: bool = False
    stale_endpoint: EndpointState | None = None  # its kept connection was closed before the request got there
    dialling: Mapping[UpstreamResponse, Attempt] = {}  # without a connection yet, cancelled ones too
    deaths: Mapping[EndpointState, Task[bool]] = {}  # Endpoints lost with the request: whether each is down

    # --- sending ---

    def reserve(self, route: ModelRouteState, deployment: DeploymentState, placed: PlacedRequest | None) -> None:
        """Make the next attempt for a reserved slot."""
        reservation = placed.reservation if placed is not None else None
        self.current = self.last = Attempt(self.services, route, deployment, reservation)

    def send(self, now_s: float) -> float:
        """Send the current attempt. Returns how long it may take to its first event, 0 if no Endpoint is healthy."""
        attempt = self.current
        assert attempt is not None, "a slot is reserved before anything is sent"
        reservation, deployment, received = attempt.reservation, attempt.deployment, self.received
        self.count += 1
        if reservation is None:
            endpoint, predicted_s = deployment.choose_endpoint(now_s, self.failed), None
        else:
            endpoint, predicted_s = attempt.choose_endpoint(now_s, self.failed), reservation.predicted_ttft_s
        if endpoint is None:
            return 0.0
        carried = CarriedRequest(self.id, self.count, received, self.resume, self)
        attempt.send(endpoint, self.usage, carried, now_s)
        if attempt.response is not None and not attempt.response.is_connected:
            self._begin_dial(attempt, attempt.response)
        return deadlines.first_event_s(received.info.stream, len(received.body), deployment, predicted_s)

    def send_beside(self, route: ModelRouteState, placed: PlacedRequest, endpoint: EndpointState, now_s: float) -> None:
        """Send a second attempt beside the current one."""
        self.count += 1
        attempt = self.hedge = Attempt(self.services, route, placed.deployment, placed.reservation)
        attempt.send(endpoint, self.usage, CarriedRequest(self.id, self.count, self.received, None, self), now_s)
        if attempt.response is not None and not attempt.response.is_connected:
            self._begin_dial(attempt, attempt.response)

    def _begin_dial(self, attempt: Attempt, response: UpstreamResponse) -> None:
        """Remember a dial: its failure is a health signal even if the attempt was cancelled meanwhile."""
        self.dialling = {**self.dialling, response: attempt}

    def _end_dial(self, response: UpstreamResponse) -> None:
        self.dialling = {other: attempt for other, attempt in self.dialling.items() if other is not response}

    def first_event_s(self) -> float:
        """The first-event timeout of the current attempt, which was the second of two."""
        current, received = self.current, self.received
        assert current is not None, "it was just adopted"
        predicted_s = current.reservation.predicted_ttft_s if current.reservation is not None else None
        return deadlines.first_event_s(received.info.stream, len(received.body), current.deployment, predicted_s)

    @property
    def is_streaming(self) -> bool:
        """Whether the client gets a stream."""
        response = self.current.response if self.current is not None else None
        return self.resume is not None or (response is not None and response.stream)

    def mark_resumable(self, event: AttemptFailed, attempt: Attempt, now_s: float) -> AttemptFailed:
        """The same event, marked as resumable if the response can be resumed elsewhere."""
        response, body = attempt.response, self.received.body
        if response is None or response.finish_seen:
            return event  # after a `finish_reason` no content is missing, and a resuming engine would add some
        if self.resume is None and response.transcript is not None:
            failed = (*self.failed, attempt.endpoint) if attempt.endpoint is not None else self.failed
            self.resume = Resume.of(self.received, response, attempt.route, failed, now_s)
        if self.resume is None or not self.resume.is_possible(body):
            return event
        self.resume.broke_off(response.event_count, now_s)
        return msgspec.structs.replace(event, resumable=True)

    def _find(self, response: UpstreamResponse) -> Attempt | None:
        """The attempt that this response belongs to."""
        for attempt in (self.current, self.hedge, self.last):
            if attempt is not None and attempt.response is response:
                return attempt
        return None

    # --- reports of the transport ---
    # The event loop enters here: an internal error ends this request alone. faults.md row 75.

    def on_dial_slow(self, response: UpstreamResponse) -> None:
        """Dial a second Deployment: the connection of an attempt takes unusually long."""
        try:
            if self.current is None or response is not self.current.response or self.hedge is not None:
                return
            self.owner.on_dial_slow()
            hedge = self.hedge
            if hedge is not None and hedge.response is not None and hedge.response.is_connected:
                self.on_connected(hedge.response)
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_connected(self, response: UpstreamResponse) -> None:
        """One of two attempts has a connection: cancel the other if it has none, which means that it was not sent."""
        try:
            self._end_dial(response)
            current, hedge = self.current, self.hedge
            if current is None or hedge is None or current.response is None or hedge.response is None:
                return
            if response is current.response and not hedge.response.is_connected:
                self.end_hedge(self.now_s())
                self.owner.on_one_given_up(False)
            elif response is hedge.response and not current.response.is_connected:
                self.adopt_hedge(self.now_s())
                self.owner.on_one_given_up(True)
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_first(self, response: UpstreamResponse) -> None:
        """Pass on the first content, and cancel the other attempt."""
        try:
            if self.hedge is not None:
                if response is self.hedge.response:
                    self.adopt_hedge(self.now_s())
                else:
                    self.end_hedge(self.now_s())
            self.was_read = True
            self.owner.on_content(response)
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_failed(self, response: UpstreamResponse, event: AttemptFailed) -> None:
        """An attempt is lost."""
        try:
            hedge = self.hedge
            if hedge is None or response is not hedge.response:
                self.owner.on_lost(event)
                return
            self.hedge = None  # the first attempt still runs, so the core gets no event
            self._record_failure(hedge, event.failure)
            hedge.account(self.usage, event.failure.value.encode(), False)
            hedge.settle(self.now_s())
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_stale(self, response: UpstreamResponse) -> None:
        """Send the request again on a new connection: the kept one was closed before the request got there."""
        try:
            attempt = self._find(response)
            assert attempt is not None, "the transport reports an attempt only while it is known"
            if attempt is self.current:
                self.stale_endpoint = attempt.endpoint
            carried = CarriedRequest(self.id, self.count, self.received, self.resume, self)
            attempt.send_again(self.usage, carried)
            if attempt.response is not None:
                self._begin_dial(attempt, attempt.response)
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_not_connected(self, response: UpstreamResponse, failure: Failure, reason: str) -> None:
        """An attempt could not connect. That is a health signal even if the attempt was cancelled meanwhile."""
        try:
            attempt, effects = self.dialling.get(response), self.effects
            self._end_dial(response)
            if attempt is not None:
                effects.outcomes.not_connected(attempt.deployment, reason, self.now_s())
                if response.over and attempt.endpoint is not None:
                    effects.outcomes.attempt_failed(attempt.route, attempt.deployment, failure)
                    effects.health.record_failure(attempt.endpoint, failure)
            if not response.over:
                self.on_failed(response, AttemptFailed(failure, sent=False))
        except Exception as error:
            self.owner.on_internal_error(error)

    def on_internal_error(self, error: Exception) -> None:
        """An internal error happened while a response was read."""
        self.owner.on_internal_error(error)

    # --- two attempts ---

    def adopt_hedge(self, now_s: float) -> None:
        """Make the second attempt the current one: it was faster, or the first one is lost."""
        if self.current is not None:
            self._give_up(self.current, self.was_read, now_s)
        self.current = self.last = self.hedge
        self.hedge = None

    def end_hedge(self, now_s: float) -> None:
        """Cancel the second attempt."""
        hedge, self.hedge = self.hedge, None
        if hedge is not None:
            self._give_up(hedge, False, now_s)

    def _give_up(self, attempt: Attempt, was_read: bool, now_s: float) -> None:
        attempt.cancel()
        attempt.account(self.usage, HEDGED, was_read)
        attempt.settle(now_s)

    # --- ends ---

    def count_failure(self, attempt: Attempt, event: AttemptFailed) -> None:
        """Count a lost attempt, and apply the Retry-After of a full engine."""
        effects, deployment = self.effects, attempt.deployment
        effects.outcomes.attempt_failed(attempt.route, deployment, event.failure)
        if event.failure is _FULL:
            effects.accounts.count(deployment.slot, _REFUSED)
            if event.wait_s > RETRY_AFTER_IN_PLACE_MAX_S:  # engines send shorter times for any full queue
                effects.health.apply_retry_after(deployment, event.wait_s)

    def lose(self, attempt: Attempt, failure: Failure, now_s: float) -> None:
        """Settle the lost current attempt: record the failure, charge it, release its slot."""
        self._record_failure(attempt, failure)
        attempt.account(self.usage, failure.value.encode(), self.was_read)
        attempt.settle(now_s)
        self.current = None

    def charge(self, how: bytes) -> None:
        """Close the current attempt's usage; nothing more is charged for it."""
        if self.current is not None:
            self.current.account(self.usage, how, self.was_read)

    def end(self, now_s: float) -> None:
        """Release the current slot: the request has ended."""
        attempt, self.current = self.current, None
        if attempt is not None:
            attempt.settle(now_s)

    def cancel(self) -> None:
        """Close the current attempt's connection."""
        if self.current is not None:
            self.current.cancel()

    def abandon(self, now_s: float) -> None:
        """Release every slot after an internal error, even if other steps fail."""
        for attempt in (self.current, self.hedge):
            if attempt is not None:
                attempt.settle(now_s)
                with suppress(Exception):  # the same error may happen here
                    attempt.cancel()
        self.current = self.hedge = None

    def _record_failure(self, attempt: Attempt, failure: Failure) -> None:
        """Record a failure; exclude its Endpoint, and those that would fail for the same reason, from this request."""
        endpoint = attempt.endpoint
        if endpoint is None:
            return
        failed = FailedAttempt(endpoint, failure, attempt.route, self.received.context.path)
        self.failed = (*self.failed, endpoint, *self.effects.health.report_failure(failed))

    # --- poison requests ---

    def hold_back(self, event: AttemptFailed, attempt: Attempt) -> bool:
        """Whether the loss is held back until it is known if this request made two engines stop.

        Each suspicious loss starts a probe of its Endpoint.
        """
        endpoint, response, services = attempt.endpoint, attempt.response, self.services
        if event.failure not in (_BROKEN, _UNREACHABLE) or self.was_read or endpoint is None:
            return False
        if event.failure is _BROKEN:
            reset = event.sent and response is not None and response.status < BAD_REQUEST
        else:  # a kept connection was closed at once, as if idle for too long; then a new one was refused
            reset = self.stale_endpoint is endpoint
        if not reset or endpoint in self.deaths:
            return False
        others, without_content = services.registry.others_at(endpoint, self.owner)
        task = self.effects.poison.probe_if_suspicious(endpoint, others, without_content)
        if task is None:
            return False
        self.deaths = {**self.deaths, endpoint: task}
        if not is_poison(len(self.deaths)):
            return False
        services.spawn(self._await_verdict(event))
        return True

    async def _await_verdict(self, event: AttemptFailed) -> None:
        """Report the loss once it is known whether the engines are down."""
        deployment = self.last.deployment if self.last is not None else None
        if await self.effects.poison.is_poison(self.deaths, self.id, deployment):
            event = AttemptFailed(Failure.POISON)
        self.owner.on_verdict(event)
