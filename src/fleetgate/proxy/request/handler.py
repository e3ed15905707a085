"""One request in a worker: the shell around its Exchange. It does what the core says and reports what happened."""

from asyncio import Task
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.exchange import (
    CLIENT_GONE,
    FINISHED,
    AttemptFailed,
    CapacityFreed,
    ClientGone,
    Command,
    Commit,
    Content,
    Continue,
    Event,
    Exchange,
    Failure,
    Finish,
    Interrupt,
    Pick,
    QueueTimeout,
    Refuse,
    Send,
    State,
    Wait,
)
from fleetgate.core.health.circuit_breaker import HEALTHY, BreakerState, Signal
from fleetgate.core.routing.policy_decision import ALLOWED
from fleetgate.ipc.shared_memory import DeploymentCounter
from fleetgate.protocols.clients import openai
from fleetgate.protocols.clients.openai import RequestInfo
from fleetgate.protocols.error_codes import MESSAGES
from fleetgate.proxy.downstream.idempotency import IdempotencyClaim
from fleetgate.proxy.request import (
    attempt as sending,
)
from fleetgate.proxy.request import (
    deadlines as watching,
)
from fleetgate.proxy.request import (
    placement as placing,
)
from fleetgate.proxy.request import (
    response_heads as answers,
)
from fleetgate.proxy.request import (
    usage as accounts,
)
from fleetgate.proxy.request.hedging import Hedge, dial_elsewhere
from fleetgate.proxy.request.reservation import PlacementRequest, Reservation
from fleetgate.proxy.request.response_writer import ResponseWriter
from fleetgate.proxy.request.resume import Resume, transcript_of
from fleetgate.proxy.routing.routing_table import DeploymentState, ModelRouteState
from fleetgate.proxy.transport.connection_pool import EndpointState
from fleetgate.proxy.transport.response_relay import ResponseRelay

if TYPE_CHECKING:
    from fleetgate.proxy.downstream.client_connection import ClientConnection
    from fleetgate.proxy.downstream.request_authorizer import RequestContext
    from fleetgate.proxy.worker.services import Hub

ROOM = CapacityFreed()
CONTENT_OK = Content(200)

ENDED, REFUSED = int(DeploymentCounter.ENDED), int(DeploymentCounter.REFUSED)


class RequestHandler(ResponseWriter):
    """A request from its whole body to its last byte. Created by the client's connection, ended by `client.ended`."""

    # Class attributes are the defaults: most requests never touch most of them, and setting each costs.
    last_place: DeploymentState | None = None  # where the last attempt went, for the books
    peer: EndpointState | None = None
    failed_peers: tuple[EndpointState, ...] = ()
    stale_at: EndpointState | None = None  # where a kept connection was closed under it
    relay: ResponseRelay | None = None
    ticket: QueueEntry | None = None
    wanting: PlacementRequest | None = None
    judgement = ALLOWED  # what policies say of it
    booking: Reservation | None = None  # beside `place`, unless the Lane's lead took the request
    hedge: Hedge | None = None  # a second attempt that runs beside the one in hand
    resumption: Resume | None = None  # once its answer broke off and goes on elsewhere
    claim: IdempotencyClaim | None = None  # its client said how it would call it again
    on_trial = False  # its attempt is to show whether an Endpoint that was out is well again
    sent_s = 0.0  # when the attempt in hand was sent
    attempt = b""  # its id in the accounts, empty while there is none
    deaths: Mapping[EndpointState, Task[bool]] = {}  # Endpoints that fell with it: whether each is really down
    seen_s = 0.0  # the clock at the last report: what follows from it needs not ask again
    deadline_s = float("inf")
    progress = 0

    def __init__(
        self, hub: "Hub", client: "ClientConnection", request: "RequestContext", lane: ModelRouteState, ask: RequestInfo
    ) -> None:
        self.hub = hub
        self.client = client
        self.request = request
        self.lane = lane
        self.ask = ask
        site = lane.site
        self.exchange = Exchange(site.gateway.resilience.attempts_max, request.budget, request.client_retries)

    def start(self, body: bytes, request_id: bytes) -> None:
        """Begin."""
        self.body = body
        self.request_id = request_id
        self.started_s = self.hub.clock()
        self.hub.conversations[self] = None
        placing.pick(self, self.exchange.start())

    def report(self, event: Event) -> None:
        """Tell the core what happened and do what it says."""
        now_s = self.seen_s = self.hub.clock()
        command = self.exchange.receive(event, now_s)
        ACTIONS[type(command)](self, command)

    # --- waiting ---

    @property
    def wants_since_s(self) -> float:
        """Since when it wants the place that it looks for."""
        return self.started_s if self.resumption is None else self.resumption.lost_s

    def shed(self) -> None:
        """The queue is full, and a request of a higher priority wants its place there."""
        placing.stop_waiting(self)
        self.report(placing.QUEUE_FULL)

    def look_again(self) -> bool:
        """There may be room now; True when it found a place (or ended)."""
        self.report(ROOM)
        return self.ticket is None

    def change_lane(self) -> None:
        """A new Snapshot replaced the Lane this request waits in: look for room in the new one, or wait there."""
        placing.stop_waiting(self)
        self.report(ROOM)

    # --- sending ---

    def _send(self, command: Send) -> None:
        place, now_s = self.place, self.seen_s
        assert place is not None
        peer = self._peer_at(place, now_s)
        self.attempts += 1
        if peer is None:
            self._lost(AttemptFailed(Failure.UNREACHABLE, sent=False))
            return
        self.peer = peer
        peer.in_flight += 1
        if peer.health is not HEALTHY and peer.health.breaker is not BreakerState.CLOSED:
            self.on_trial = self.hub.tables.try_out(peer, now_s)
        self.progress = 0
        self.sent_s = now_s
        self.deadline_s = now_s + watching.first_event_s(self, self.booking)
        self.relay = relay = sending.relay_for(self, self, place)
        self.attempt = attempt = b"%b-%d" % (self.request_id, self.attempts)
        self.hub.accounts.begin(self, place, attempt)
        sending.send(self, relay, peer, place)

    def _peer_at(self, place: DeploymentState, now_s: float) -> EndpointState | None:
        """The Endpoint that the desk chose, or, where it has just fallen out, another of the same Deployment."""
        booking = self.booking
        if booking is None:
            return place.choose(now_s, self.failed_peers)
        peer = place.peer_at(booking.endpoint_slot)
        if peer is None or peer in self.failed_peers or peer.fitness(now_s) <= 0.0:
            peer = place.choose(now_s, self.failed_peers)
            if peer is not None:
                booking.moved(peer.endpoint.slot)
        return peer

    def dials_long(self, relay: ResponseRelay) -> None:
        """The attempt in hand has no connection yet, and should have: somebody else may be nearer."""
        exchange = self.exchange
        if relay is not self.relay or exchange.state is not State.TRYING or exchange.resumes or self.hedge is not None:
            return
        self.hedge = dial_elsewhere(self, self.hub.clock())
        if self.hedge is not None and self.hedge.relay.connection is not None:
            self.connected(self.hedge.relay)

    def connected(self, relay: ResponseRelay) -> None:
        """One of two attempts has its connection: another that has none is given up before it was sent."""
        hedge = self.hedge
        if hedge is None or self.relay is None:
            return
        if relay is self.relay and hedge.relay.connection is None:
            self._end_hedge()
            self.exchange.record_unsent()
        elif relay is hedge.relay and self.relay.connection is None:
            self.adopt(hedge)
            self.exchange.record_unsent()

    # --- what the relay reports ---

    def on_first(self, relay: ResponseRelay) -> None:
        """The first content is here."""
        if self.hedge is not None:
            self._end_hedge()
        self.report(CONTENT_OK if relay.status == 200 else Content(relay.status))

    def on_failed(self, relay: ResponseRelay, event: AttemptFailed) -> None:
        """The attempt is lost."""
        self._lost(event)

    def on_stale(self, relay: ResponseRelay) -> None:
        """The kept connection was closed before the request got there: send it again on a new one."""
        assert self.peer is not None and self.place is not None
        self.stale_at = self.peer
        self.attempt = self.hub.accounts.again(self, self.place, self.attempt)
        self.relay = sending.relay_for(self, self, self.place)
        sending.send(self, self.relay, self.peer, self.place, fresh=True)

    def on_ended(self, relay: ResponseRelay, tail: bytes) -> None:
        """The answer ended as it should."""
        self.tail += tail
        if self.peer is not None and self.peer.health is not HEALTHY:  # to a healthy one good news is no news
            self.hub.ward.saw(self.peer, Signal.WENT_WELL)
        if self.booking is not None:
            self.hub.learn(self, self.booking, relay)
        elif self.place is not None:
            self.hub.tally(self.place.slot, ENDED)
        self.report(FINISHED)

    def now_s(self) -> float:
        """The loop's clock."""
        return self.hub.clock()

    def _lost(self, event: AttemptFailed) -> None:
        """Settle the attempt's place, tell health, and let the core say what comes next."""
        if self.place is not None:
            self.hub.count_failure(self.lane, self.place, event.failure)
        if self.place is not None and event.failure is Failure.FULL:
            self.hub.tally(self.place.slot, REFUSED)
            if event.wait_s > placing.COOLS_WAIT_MAX_S:  # what is shorter, engines say of any full queue
                self.hub.ward.asked_to_wait(self.place, event.wait_s)
        if self.first_s and event.failure is not Failure.MISMATCH:
            event = self._resumable(event)
        if self.peer is not None:
            self.blame(self.peer, event.failure)
        self.account(event.failure.value.encode())
        self._settle(self.hub.clock())
        if self.hedge is not None:
            self.exchange.failures = (*self.exchange.failures, event)
            self.adopt(self.hedge)
        elif not self.hub.suspects.holds(self, event):
            self.report(event)

    def account(self, how: bytes) -> None:
        """The attempt in hand is over, but not its request."""
        attempt, self.attempt = self.attempt, b""
        if attempt:
            self.hub.accounts.lost(self, attempt, self.relay, how)

    def judged(self, event: AttemptFailed) -> None:
        """What was held back until more was known of it."""
        if self.exchange.state is State.TRYING:
            self.report(event)

    def blame(self, peer: EndpointState, failure: Failure) -> None:
        """An attempt at this Endpoint is lost."""
        self.failed_peers = (*self.failed_peers, peer)
        self.hub.ward.blame(self, peer, failure)

    def adopt(self, hedge: Hedge) -> None:
        """The second attempt takes the first one's place: it was quicker, or it is the one that is left."""
        now_s = self.hub.clock()
        if self.relay is not None:
            self.relay.cancel()
        self.account(accounts.HEDGED)
        self._settle(now_s)
        self.hedge, self.attempt = None, hedge.attempt
        self.place = self.last_place = hedge.place
        self.peer, self.booking, self.relay = hedge.peer, hedge.booking, hedge.relay
        hedge.relay.owner = self
        self.deadline_s = now_s + watching.first_event_s(self, hedge.booking)

    def _end_hedge(self) -> None:
        hedge, self.hedge = self.hedge, None
        if hedge is not None:
            hedge.cancel()

    def _resumable(self, event: AttemptFailed) -> AttemptFailed:
        """The same loss, with whether the answer that is half-way out can go on elsewhere."""
        relay = self.relay
        if relay is not None and relay.finish_seen:
            return event  # behind an end there is nothing to go on with: an engine that is asked to would say more
        if self.resumption is None and relay is not None and relay.script is not None:
            self.resumption = Resume.of(self, relay, self.hub.clock())
        if self.resumption is None or not self.resumption.can_go_on(self.body):
            return event
        self.resumption.broke_off(relay, self.hub.clock())
        return msgspec.structs.replace(event, resumable=True)

    def _settle(self, now_s: float) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.in_flight -= 1
            if self.on_trial:
                self._tried_out(peer, now_s, well=False)
        place, self.place = self.place, None
        if place is not None:
            self.lane.drain.record_end(now_s)
            booking, self.booking = self.booking, None
            if booking is None:
                self.hub.ledger.settle(place.slot)
            else:
                booking.settle()
            self.hub.room_freed(place.slot)

    def _tried_out(self, peer: EndpointState, now_s: float, well: bool) -> None:
        self.on_trial = False
        self.hub.tables.tried_out(peer, now_s, well)

    # --- what the core says ---

    def _commit(self, command: Commit) -> None:
        relay, place = self.relay, self.place
        assert relay is not None and place is not None
        self.first_s = self.seen_s
        self.status = relay.status
        whole = relay.finish_seen and not relay.stream
        if self.early_attempts:
            self.say_who_answers(place)
            if whole:
                self.say_as_event(relay.held[0])
            else:
                self._flow(relay)
            return
        if relay.raw and not whole:
            self.client.keep_alive = False  # only the end of the connection tells an HTTP/1.0 client the length
        head = answers.relayed_head(self, relay, place, len(relay.held[0]) if whole else -1)
        if whole:
            self.tail = head + relay.held[0]
        else:
            self.write(head)
            self._flow(relay)

    def _flow(self, relay: ResponseRelay) -> None:
        """From here on the answer goes to the client as it comes."""
        self.deadline_s = self.first_s + watching.stall_s(self)
        if self.on_trial and self.peer is not None:  # others need not wait for the end of a long answer
            self._tried_out(self.peer, self.first_s, well=True)
        if self.lane.hedges and self.wanting is not None and relay.stream:
            self.lane.first_tokens.record(self.wanting.need.prompt_tokens, self.first_s - self.started_s)
        if relay.stream:
            relay.script = transcript_of(self)
        if self.booking is not None:
            self.booking.first_token(self.first_s - self.started_s, self.first_s)
            self.hub.prompt_done()

    def _continue(self, command: Continue) -> None:
        """Another Deployment has come to where the answer broke off; its client can read who it is."""
        place, now_s = self.place, self.seen_s
        assert place is not None
        self.say_who_answers(place)
        self.deadline_s = now_s + watching.stall_s(self)
        if self.booking is not None:
            self.booking.went_on(now_s)
            self.hub.prompt_done()
        self.hub.resumed(self)

    def _refuse(self, command: Refuse) -> None:
        placing.stop_waiting(self)
        self.status = command.status
        if self.early_attempts:
            self._break_off(command.code, command)
            return
        self.write(answers.refusal(self, command))
        self._end(command)

    def _interrupt(self, command: Interrupt) -> None:
        """Never a clean end of an unfinished answer: say so inside the stream, then close without the last chunk."""
        placing.stop_waiting(self)
        if self.request.raw and not self.ask.stream:
            self.client.transport.abort()  # to HTTP/1.0 a regular close would be a good end
        self._break_off("upstream_interrupted", command)

    def _break_off(self, code: str, command: Command) -> None:
        if self.ask.stream:
            self.write_event(openai.error_event(code, MESSAGES[code]))
        self.client.keep_alive = False
        self._end(command)

    def _end(self, command: Command) -> None:
        if self.hedge is not None:
            self._end_hedge()
        if self.attempt or self.owed is not None:
            self.hub.accounts.end(self, self.attempt, self.relay)
        self._settle(self.seen_s)
        if self.claim is not None:
            self.claim.end(self)
        self.write(self.tail)
        self.hub.conversations.pop(self, None)
        self.hub.record(self)
        self.relay = None
        self.client.ended(self.seen_s)

    # --- what ends it from outside ---

    def client_gone(self, event: ClientGone = CLIENT_GONE) -> None:
        """The client left: cancel upstream, in whatever phase."""
        if self.exchange.state is State.ENDED:
            return
        placing.stop_waiting(self)
        if self.relay is not None:
            self.relay.cancel()
        self.report(event)

    def overdue(self, now_s: float) -> None:
        """A deadline passed: of waiting, of the first event, or of the next one."""
        relay = self.relay
        if self.exchange.state is State.WAITING:
            placing.stop_waiting(self)
            ahead = max(1, len(self.lane.room))
            self.report(QueueTimeout(self.lane.drain.retry_after_s(ahead)))
        elif relay is not None and relay.paused:
            self.deadline_s = self.client.still_reads(now_s)  # the client stalls: nothing against the Endpoint
        elif relay is not None and not relay.finish() and not watching.has_more_time(self, now_s):
            relay.cancel()
            self._lost(AttemptFailed(Failure.TIMEOUT))

    def pause(self) -> None:
        """The client reads slower than the upstream writes."""
        if self.relay is not None and self.relay.connection is not None:
            self.relay.paused = True
            self.relay.connection.transport.pause_reading()

    def resume(self) -> None:
        """It caught up."""
        if self.relay is not None and self.relay.connection is not None:
            self.relay.paused = False
            self.relay.connection.transport.resume_reading()


ACTIONS: dict[type, Callable[..., None]] = {
    Pick: placing.pick,
    Wait: placing.wait,
    Send: RequestHandler._send,
    Commit: RequestHandler._commit,
    Continue: RequestHandler._continue,
    Refuse: RequestHandler._refuse,
    Interrupt: RequestHandler._interrupt,
    Finish: RequestHandler._end,
}
