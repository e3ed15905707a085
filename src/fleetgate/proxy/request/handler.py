"""Runs one request in a worker: it reports events to its Exchange and carries out the Exchange's commands."""

from collections.abc import Callable
from contextlib import suppress

from fleetgate.core import exchange as moves
from fleetgate.core.exchange import AttemptFailed, Command, Event, Exchange, Failure, NotPicked, Outcome, Refuse, State
from fleetgate.core.health.circuit_breaker import HEALTHY, Signal
from fleetgate.proxy.request import deadlines
from fleetgate.proxy.request.attempt import Attempt
from fleetgate.proxy.request.attempts import AttemptSet
from fleetgate.proxy.request.deadlines import ProgressMonitor, is_hedge_due
from fleetgate.proxy.request.outcome import RequestSummary, final_response
from fleetgate.proxy.request.placement import QUEUE_FULL, SlotSearch
from fleetgate.proxy.request.request_context import ReceivedRequest
from fleetgate.proxy.request.reservation import ENDED, PlacementRequest
from fleetgate.proxy.request.response.client_stream import ClientStream
from fleetgate.proxy.request.response.writer import ResponseWriter
from fleetgate.proxy.request.resume import transcript_for
from fleetgate.proxy.request.services import HandlerServices
from fleetgate.proxy.request.usage import UsageRecorder
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.interface import UpstreamResponse

CAPACITY_FREED, FINISHED = moves.CapacityFreed(), moves.FINISHED
CONTENT_OK = moves.Content(200)
REVOKED = Refuse(401, "invalid_api_key", should_retry=False)
SHUTTING_DOWN = Refuse(503, "shutting_down", retry_after_s=1.0, should_retry=True)
_TRYING, _WAITING, _COMMITTED, _ENDED = State.TRYING, State.WAITING, State.COMMITTED, State.ENDED


class RequestHandler:
    """Runs a request from its complete body to its last byte. Shape: `client.ended` is called at its end."""

    # Class attributes are the defaults: most requests never change most of them, and setting each costs time.
    search: SlotSearch | None = None  # made if the route's lead cannot take the request
    first_s = 0.0
    deadline_s = float("inf")
    _monitor: ProgressMonitor | None = None

    def __init__(self, services: HandlerServices, client: ClientStream, received: ReceivedRequest) -> None:
        context = received.context
        self._services = services
        self._clock = services.attempts.clock
        self._outcomes = services.effects.outcomes
        self.client = client
        self.received = received
        self.route = received.route
        self.id = request_id = next(services.ids)
        self.writer = writer = ResponseWriter(client, request_id, context, services.defaults)
        outcomes, route = self._outcomes, received.route
        names, size = (context.key_json, route.log_names), len(received.body)
        usage = UsageRecorder(outcomes.journal_add, names, outcomes.estimates, route.model, size)
        write, ended, clock = writer.write, self.on_answered, self._clock
        attempts, effects = services.attempts, services.effects
        self.attempts = AttemptSet(attempts, effects, request_id, received, usage, self, write, clock, ended)
        resilience = received.route.gateway.spec.resilience
        self.exchange = Exchange(resilience.attempts_max, context.budget, context.client_retries)

    def start(self) -> None:
        """Begin. Called once, after the client's connection has stored this request."""
        self.started_s = self.now_s = self._clock()
        self._services.registry.in_flight[self] = None
        self._run(self.exchange.start())

    # --- the command loop ---

    def report(self, event: Event) -> None:
        """Send an event to the core, and carry out its commands until there is none."""
        now_s = self.now_s = self._clock()
        self._run(self.exchange.receive(event, now_s))

    def _run(self, command: Command) -> None:
        while (event := ACTIONS[type(command)](self, command)) is not None:
            command = self.exchange.receive(event, self.now_s)

    # --- for the registry and the connection ---

    @property
    def is_streaming(self) -> bool:
        """Whether an SSE comment may be sent to the client now."""
        return bool(self.writer.early_attempts or self.attempts.is_streaming)

    @property
    def endpoint(self) -> EndpointState | None:
        """The Endpoint of the current attempt."""
        current = self.attempts.current
        return current.endpoint if current is not None else None

    # --- placement ---

    def _pick(self, command: moves.Pick) -> Event:
        services, route = self._services, self.route
        if route.table is not services.attempts.active.current:
            route = self.route = services.placer.current_route(route)
        if route.lead is not None and not command.tried:
            deployment = services.placer.take_lead(route)
            if deployment is not None:
                self.attempts.reserve(route, deployment, None)
                return route.lead_picked
        search = self.search or self._begin_search()
        placed = search.place(route, command.tried, self.attempts.failed, self.attempts.resume, self.now_s)
        if isinstance(placed, NotPicked):
            return placed
        if search.entry is not None:
            search.leave_queue(self, served=True)
        self.attempts.reserve(route, placed.deployment, placed)
        return moves.Picked(placed.candidate)

    def _begin_search(self) -> SlotSearch:
        services, received = self._services, self.received
        request = PlacementRequest(received, self.route, self._outcomes.estimates)
        self.search = SlotSearch(services.placer, services.registry, self.id, received, self.started_s, request)
        return self.search

    def _wait(self, command: moves.Wait) -> Event | None:
        search = self.search or self._begin_search()
        if search.entry is not None:
            return None  # no slot: the request keeps its place in the queue
        refused = search.enqueue(self, self.attempts.resume, self.exchange.moves > 0, self.now_s)
        if search.entry is not None:
            self.deadline_s = search.entry.deadline_s
        return refused

    def _leave_queue(self) -> None:
        if self.search is not None:
            self.search.leave_queue(self, served=False)

    def shed(self) -> None:
        """Leave the queue, which is full, for a request of higher priority."""
        self._leave_queue()
        self.report(QUEUE_FULL)

    def retry_placement(self) -> bool:
        """Look for a slot again. True if the request found one or ended."""
        self.report(CAPACITY_FREED)
        return self.search is None or self.search.entry is None

    def change_route(self) -> None:
        """Move to the route of a new Snapshot: look for a slot there, or wait there."""
        self._leave_queue()
        self.report(CAPACITY_FREED)

    # --- sending ---

    def _send(self, command: moves.Send) -> Event | None:
        attempts, now_s = self.attempts, self.now_s
        if self._monitor is not None:
            self._monitor.restart()
        first_event_s = attempts.send(now_s)
        if not first_event_s:
            return self._lost(AttemptFailed(Failure.UNREACHABLE, sent=False))
        if attempts.resume is not None and self.client.is_behind:
            self.pause()  # what its client has not read of the first attempt is still held
        self.deadline_s = now_s + first_event_s
        return None

    def _send_beside(self) -> bool:
        """Send a second attempt beside the first; False if no other Deployment has a slot."""
        search = self.search or self._begin_search()
        placed = search.place_beside(self.route, self.exchange.tried, self.now_s)
        if placed is None:
            return False
        slot, endpoint = placed
        self.exchange.record_hedge(slot.candidate)
        self.attempts.send_beside(self.route, slot, endpoint, self.now_s)
        return True

    # --- reports of attempts ---

    def on_dial_slow(self) -> None:
        """Dial another Deployment too. The first connection gets the request, so no engine gets more requests.

        Like a first move, the first such dial is not charged to the budget.
        """
        exchange = self.exchange
        if exchange.state is not _TRYING or exchange.resumes:
            return
        self.now_s = now_s = self._clock()
        if (not exchange.moves or self.received.context.budget.take(now_s)) and self._send_beside():
            exchange.record_move()

    def on_one_given_up(self, is_adopted: bool) -> None:
        """One of two attempts was cancelled before it was sent, so no budget counts it."""
        self.exchange.record_unsent()
        if is_adopted:
            self.deadline_s = self._clock() + self.attempts.first_event_s()

    def on_content(self, response: UpstreamResponse) -> None:
        """The first content came."""
        event = CONTENT_OK if response.status == 200 else moves.Content(response.status)
        self.now_s = now_s = self._clock()
        self._run(self.exchange.receive(event, now_s))

    def on_answered(self, response: UpstreamResponse, tail: bytes) -> None:
        """The response ended well. The event loop enters here: an internal error ends this request alone."""
        try:
            attempt, effects = self.attempts.current, self._services.effects
            assert attempt is not None, "only the current attempt's response can end"
            self.writer.append(tail)
            endpoint, now_s = attempt.endpoint, self._clock()
            if endpoint is not None and endpoint.health is not HEALTHY:  # success does not change a healthy Endpoint
                effects.health.record(endpoint, Signal.WENT_WELL)
            if attempt.reservation is not None:
                request = self.search.request if self.search is not None else None
                effects.outcomes.learn(self.received, self.route, request, attempt.reservation, response, now_s)
            else:
                effects.accounts.count(attempt.deployment.slot, ENDED)
            self.now_s = now_s
            self._run(self.exchange.receive(FINISHED, now_s))
        except Exception as error:
            self.on_internal_error(error)

    # --- a lost attempt ---

    def on_lost(self, event: AttemptFailed) -> None:
        """The current attempt is lost."""
        self.now_s = self._clock()
        lost = self._lost(event)
        if lost is not None:
            self.report(lost)

    def _lost(self, event: AttemptFailed) -> Event | None:
        """Settle the attempt. Returns the core's event, None while another attempt or a check is under way."""
        attempts, now_s = self.attempts, self.now_s
        attempt = attempts.current
        if attempt is None:
            return event
        attempts.count_failure(attempt, event)
        if self.first_s and event.failure is not Failure.MISMATCH:
            event = attempts.mark_resumable(event, attempt, now_s)
        attempts.lose(attempt, event.failure, now_s)
        if attempts.hedge is not None:
            self.exchange.record_failure(event)
            attempts.adopt_hedge(now_s)
            self.deadline_s = now_s + self.attempts.first_event_s()
            return None
        if attempts.hold_back(event, attempt):
            self.deadline_s = float("inf")
            return None
        return event

    def on_verdict(self, event: AttemptFailed) -> None:
        """Report a held-back loss: it is now known whether this request is poison."""
        if self.exchange.state is _TRYING:
            self.report(event)

    # --- the response ---

    def _commit(self, command: moves.Commit) -> None:
        attempts = self.attempts
        attempt = attempts.current
        assert attempt is not None and attempt.response is not None, "content came from the current attempt"
        response = attempt.response
        self.first_s = self.now_s
        self.writer.write_relayed_head(attempts.count, response, attempt.deployment)
        if not response.finish_seen or response.stream:
            self._relay(attempt, response)

    def _relay(self, attempt: Attempt, response: UpstreamResponse) -> None:
        """Commit: from now on the response is passed to the client as it arrives."""
        first_s, route = self.first_s, self.route
        self.deadline_s = first_s + deadlines.stall_s(attempt.deployment)
        if attempt.on_trial:
            attempt.show_content(first_s)
        if response.stream:
            if route.hedges and self.search is not None:
                prompt_tokens = self.search.request.shape.prompt_tokens
                route.hedge_threshold.record(prompt_tokens, first_s - self.started_s)
            response.transcript = transcript_for(self.received, route, attempt.deployment)
        if attempt.reservation is not None:
            attempt.reservation.first_token(first_s - self.started_s, first_s)
            self._services.registry.wake_soon()

    def _continue(self, command: moves.Continue) -> None:
        """Continue the client's stream from another Deployment; a comment names that Deployment."""
        attempts, now_s = self.attempts, self.now_s
        attempt = attempts.current
        assert attempt is not None and self.attempts.resume is not None, "a resumed response has both"
        self.writer.name_deployment(attempt.deployment, attempts.count)
        self.deadline_s = now_s + deadlines.stall_s(attempt.deployment)
        if attempt.reservation is not None:
            attempt.reservation.resumed(now_s)
            self._services.registry.wake_soon()
        attempts.usage.resumed()
        self._outcomes.resumed(self.route, str(self.attempts.resume.method))

    def _refuse(self, command: Refuse) -> None:
        self._leave_queue()
        if self.writer.refuse(self.attempts.count, command):
            self._finish()
        else:
            self._break_off(command.code)

    def _interrupt(self, command: moves.Interrupt) -> None:
        """End an unfinished response visibly: with an error event, then a close without the last chunk."""
        self._leave_queue()
        if self.received.context.raw and not self.received.info.stream:
            self.client.abort()  # for HTTP/1.0 a regular close would mean a complete response
        self._break_off("upstream_interrupted")

    def _break_off(self, code: str) -> None:
        if self.received.info.stream:
            self.writer.write_error(code)
        self.client.keep_alive = False
        self._finish()

    def _finish(self, command: moves.Finish | None = None) -> None:
        """End the request: settle, record, write the last bytes, release the connection."""
        attempts, writer, now_s = self.attempts, self.writer, self.now_s
        if attempts.hedge is not None:
            attempts.end_hedge(now_s)
        current, last, outcome = attempts.current, attempts.last, self.exchange.outcome or Outcome.FAILED
        response = last.response if last is not None else None
        size_bytes = writer.written + len(writer.tail)  # the tail is written after the records
        attempt_id = current.id if current is not None else b""
        if attempt_id or attempts.usage.pending is not None:
            attempts.usage.end(attempt_id, response, outcome, size_bytes)
        attempts.end(now_s)
        if self.received.claim is not None:
            self.received.claim.end(final_response(last, outcome, size_bytes))
        self.writer.write(writer.tail)
        self._services.registry.in_flight.pop(self, None)
        self._outcomes.record(
            RequestSummary(
                id=self.id,
                received=self.received,
                route=self.route,
                outcome=outcome,
                status=writer.status,
                attempts=attempts.count,
                resumes=self.exchange.resumes,
                written_bytes=writer.written,
                started_s=self.started_s,
                first_s=self.first_s,
                ended_s=now_s,
                attempt=last,
                placement_request=self.search.request if self.search is not None else None,
            )
        )
        self.client.ended(now_s)
        attempts.last = None  # its response leads back to `attempts`, and `attempts` to this request: without these
        del self.attempts  # two lines only the cycle collector would free them, with the body that was held

    # --- ends from outside ---

    def client_gone(self, event: moves.ClientGone = moves.CLIENT_GONE) -> None:
        """Cancel upstream, in any phase: the client left."""
        if self.exchange.state is _ENDED:
            return
        self._leave_queue()
        self.attempts.cancel()
        self.report(event)

    def terminate(self, why: Refuse) -> None:
        """End it with an error while the client is connected: a revoked key, or a worker that stops."""
        if self.exchange.state is _ENDED:
            return
        self.client.keep_alive = False
        if not self.writer.written:
            self.attempts.charge(Outcome.REFUSED.value.encode())  # not billed
            self.writer.hold_refusal(self.attempts.count, why)
            self.client_gone(moves.ClientGone(Outcome.REFUSED))
            return
        if self.received.info.stream:
            self.writer.write_error(why.code)
        elif self.received.context.raw:
            self.client.abort()  # for HTTP/1.0 a regular close would mean a complete response
        self.client_gone()

    def on_internal_error(self, error: BaseException) -> None:
        """Log an internal error, and end this request alone."""
        self._services.defaults.on_error(error, self.id)
        if "attempts" in self.__dict__:  # else it has ended, and its client may be in its next request
            self.client.fail(self.id)

    def fail(self) -> bool:
        """Cancel upstream and settle after an internal error, even if other steps fail.

        Returns whether the client reads a stream in which an error event may still be written.
        """
        self.writer.discard()
        with suppress(Exception):  # the error may come again here
            self.client_gone()
        attempts: AttemptSet | None = self.__dict__.pop("attempts", None)
        if attempts is not None:  # the regular end was not reached; the slots must be released anyway
            self._services.registry.in_flight.pop(self, None)
            attempts.abandon(self._clock())
        return self.received.info.stream and not self.received.context.raw

    # --- deadlines and ticks ---

    def tick(self, now_s: float, furthest: dict[int, int] | None) -> None:
        """Check deadlines and hedging, every 50 ms; with `furthest`, once a second, also the progress."""
        if furthest is not None:
            self._check_progress(now_s, furthest)
        if self.deadline_s <= now_s:
            self._overdue(now_s)
        elif self.route.hedges:
            self._hedge_if_due(now_s)

    def _hedge_if_due(self, now_s: float) -> None:
        exchange = self.exchange
        if self.attempts.hedge is not None or exchange.state is not _TRYING or exchange.resumes:
            return
        request = self.search.request if self.search is not None else None
        accounts = self._services.effects.accounts
        if is_hedge_due(self.received, self.route, request, accounts, self.started_s, now_s):
            self.now_s = now_s
            self._send_beside()

    def _overdue(self, now_s: float) -> None:
        """Handle a passed deadline: of the queue, the first event or the next event."""
        if self.exchange.state is _WAITING:
            self._leave_queue()
            self.report(moves.QueueTimeout(self.route.drain_rate.retry_after_s(max(1, len(self.route.queue)))))
            return
        current = self.attempts.current
        if current is None or current.response is None or self._is_excused(current.response, now_s):
            return
        if not self._has_more_time(current, now_s):
            current.cancel()
            self.on_lost(AttemptFailed(Failure.TIMEOUT))

    def move_from(self, endpoint: EndpointState, silent_s: float, now_s: float) -> None:
        """Move, if its Endpoint is unreachable and it has waited there for its first event long enough."""
        current = self.attempts.current
        if current is None or current.endpoint is not endpoint or self.exchange.state is not _TRYING:
            return
        if now_s - current.sent_s <= silent_s or current.response is None:
            return
        if not self._is_excused(current.response, now_s):
            current.cancel()
            self.on_lost(AttemptFailed(Failure.TIMEOUT))

    def _is_excused(self, response: UpstreamResponse, now_s: float) -> bool:
        """Whether the silence is no fault of the Endpoint: the client stalls, or only last bytes are missing."""
        if response.paused:
            self.deadline_s = self.client.next_read_deadline_s(now_s)
            return True
        return response.finish()

    def _has_more_time(self, attempt: Attempt, now_s: float) -> bool:
        """Whether a response that is not streamed may take longer than the minimum; if so, extend its deadline."""
        if self.received.info.stream or self.first_s:
            return False
        reservation = attempt.reservation
        predicted_s = reservation.predicted_ttft_s if reservation is not None else None
        tokens_max = self.received.context.protocol.output_tokens_max(self.received.body)
        self.deadline_s = attempt.sent_s + deadlines.whole_answer_s(attempt.deployment, predicted_s, tokens_max)
        return self.deadline_s > now_s

    def _check_progress(self, now_s: float, furthest: dict[int, int]) -> None:
        """Restart the stall timeout if the response made progress since the last tick. Once a second."""
        attempts, first_s, is_stream = self.attempts, self.first_s, self.received.info.stream
        monitor = self._monitor = self._monitor or ProgressMonitor()
        current = attempts.current
        if current is not None and current.response is not None:
            response = current.response
            if current.reservation is not None:
                current.reservation.tick(response.event_count if first_s else -1, furthest, now_s)
            if (response.stream or is_stream) and self.attempts.resume is None and not self.client.is_behind:
                size, is_first = len(self.received.body), attempts.count == 1
                monitor.observe_speed(current, response, (first_s, now_s), size, is_first)
            if first_s and monitor.has_moved(response):
                self.deadline_s = now_s + deadlines.stall_s(current.deployment)
                if current.id:
                    attempts.usage.progress(current.id, response)
                if self.exchange.state is _COMMITTED:
                    monitor.note_read(current.deployment, first_s, now_s, self.client.is_behind)
        if is_stream and monitor.is_comment_due(self.started_s, now_s):
            sent_to = current.deployment if current is not None and self.exchange.state is _TRYING else None
            if self.writer.keep_alive(attempts.count, sent_to):
                monitor.note_comment(now_s)

    def pause(self) -> None:
        """Pause the upstream: the client reads slower than the upstream writes."""
        current = self.attempts.current
        if current is not None and current.response is not None:
            current.response.pause()

    def resume(self) -> None:
        """Resume the upstream: the client caught up."""
        current = self.attempts.current
        if current is not None and current.response is not None:
            current.response.resume()


ACTIONS: dict[type, Callable[..., Event | None]] = {
    moves.Pick: RequestHandler._pick,
    moves.Wait: RequestHandler._wait,
    moves.Send: RequestHandler._send,
    moves.Commit: RequestHandler._commit,
    moves.Continue: RequestHandler._continue,
    Refuse: RequestHandler._refuse,
    moves.Interrupt: RequestHandler._interrupt,
    moves.Finish: RequestHandler._finish,
}
