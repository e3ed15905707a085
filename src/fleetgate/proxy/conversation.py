"""One request in a worker: the shell around its Exchange. It does what the core says and reports what happened."""

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fleetgate.core.admission import Ticket
from fleetgate.core.board import Tally
from fleetgate.core.exchange import (
    FINISHED,
    GONE,
    Command,
    Commit,
    Content,
    Event,
    Exchange,
    Failed,
    Failure,
    Finish,
    Interrupt,
    NotPicked,
    Overdue,
    Pick,
    Picked,
    QueueFull,
    Refuse,
    Room,
    Send,
    State,
    Wait,
)
from fleetgate.core.health import HEALTHY, Breaker, Sign, current
from fleetgate.core.policy import ALLOWED
from fleetgate.core.route import NoPlace, Rejection
from fleetgate.protocols import http1, openai
from fleetgate.protocols.openai import Ask
from fleetgate.proxy import answers
from fleetgate.proxy.booking import Booking, Wanting
from fleetgate.proxy.tables import LaneState, Place
from fleetgate.proxy.transport.relay import Names, Relay
from fleetgate.proxy.transport.upstream import Peer, Refused

if TYPE_CHECKING:
    from fleetgate.proxy.gate import Admitted
    from fleetgate.proxy.hub import Hub
    from fleetgate.proxy.listener import ClientConnection

# Until the predicted TTFT is known (capacity profiles), these bound how long an upstream may stay silent.
FIRST_EVENT_MAX_S = 60.0
WHOLE_ANSWER_MAX_S = 600.0  # the official SDKs' own default
STALL_MAX_S = 60.0  # FAULTS.md row 8: at most
ROOM = Room()
CONTENT_OK = Content(200)
QUEUE_FULL = QueueFull()

ENDED, REFUSED = int(Tally.ENDED), int(Tally.REFUSED)

# What a failed attempt says about an Endpoint's health. What is missing here says nothing.
SIGNS = {
    Failure.BROKEN: Sign.BROKE,
    Failure.BAD_OUTPUT: Sign.BROKE,
    Failure.UNREACHABLE: Sign.BROKE,
    Failure.TIMEOUT: Sign.BROKE,
    Failure.TLS: Sign.BROKE,
    Failure.CREDENTIAL: Sign.BROKE,
}


class Conversation:
    """A request from its whole body to its last byte. Created by the client's connection, ended by `client.ended`."""

    # Class attributes are the defaults: most requests never touch most of them, and setting each costs.
    place: Place | None = None  # where a reservation is held
    last_place: Place | None = None  # where the last attempt went, for the books
    peer: Peer | None = None
    failed_peers: tuple[Peer, ...] = ()
    relay: Relay | None = None
    ticket: Ticket | None = None
    wanting: Wanting | None = None
    judgement = ALLOWED  # what policies say of it
    booking: Booking | None = None  # beside `place`, unless the Lane's lead took the request
    seen_s = 0.0  # the clock at the last report: what follows from it needs not ask again
    first_s = 0.0
    deadline_s = float("inf")
    progress = 0
    attempts = 0
    status = 0
    written = 0
    tail = b""  # the answer's last bytes, written when its place is free again

    def __init__(self, hub: "Hub", client: "ClientConnection", request: "Admitted", lane: LaneState, ask: Ask) -> None:
        self.hub = hub
        self.client = client
        self.request = request
        self.lane = lane
        self.ask = ask
        site = lane.site
        self.exchange = Exchange(site.gateway.resilience.attempts_max, site.budget, request.client_retries)

    def start(self, body: bytes, request_id: bytes) -> None:
        """Begin."""
        self.body = body
        self.request_id = request_id
        self.started_s = self.hub.clock()
        self.hub.conversations[self] = None
        self._pick(self.exchange.start())

    def _report(self, event: Event) -> None:
        """Tell the core what happened and do what it says."""
        now_s = self.seen_s = self.hub.clock()
        command = self.exchange.receive(event, now_s)
        ACTIONS[type(command)](self, command)

    # --- picking and waiting ---

    def _pick(self, command: Pick) -> None:
        hub = self.hub
        lane = self.lane
        if lane.tables is not hub.tables:
            lane = self.lane = hub.tables.lane_after(lane)
        lead = lane.lead
        if lead is not None and not command.tried and not lane.room:
            place = hub.tables.places[lead.slot]
            if place.fit >= 1.0 and not place.foreign and hub.ledger.reserve(lead.slot, place.limit):
                self.place = self.last_place = place
                self._report(Picked(lead))
                return
        self._pick_by_route(command, lane)

    def _pick_by_route(self, command: Pick, lane: LaneState) -> None:
        hub, now_s = self.hub, self.hub.clock()
        wanting = self.wanting = self.wanting or Wanting(self)
        first = lane.room.first() if self.ticket is None and not command.tried else None
        if first is not None and first.priority <= wanting.priority:
            self._report(NotPicked(NoPlace.ALL_FULL))  # others wait already, and newcomers go behind them
            return
        tried = self._exhausted(command.tried) if command.tried else ()
        wish = wanting.wish(now_s - self.started_s)
        placed = lane.desk.place(wish, hub.learning.outlooks, hub.books, now_s, tried)
        if hub.recorder is not None:
            hub.recorder.decided(self, wish, tried, placed)
        if isinstance(placed, Rejection):
            self._report(NotPicked(placed.reason))
            return
        self.place = self.last_place = hub.tables.places[placed.candidate.slot]
        self.booking = Booking(hub, placed, lane.desk.promised, now_s)
        lane.affinity.sent(wanting.chain, placed.hold.endpoint_slot)
        if self.ticket is not None:
            self._stop_waiting(served=True)
        self._report(Picked(placed.candidate))

    def _exhausted(self, slots: tuple[int, ...]) -> list[int]:
        """Those of the Deployments tried that have no other Endpoint to try."""
        places, now_s = self.hub.tables.places, self.hub.clock()
        return [slot for slot in slots if slot not in places or not places[slot].choose(now_s, self.failed_peers)]

    def _wait(self, command: Wait) -> None:
        if self.ticket is not None:
            return  # woken in vain: it keeps its place in the row
        hub, lane, wanting = self.hub, self.lane, self.wanting
        assert wanting is not None
        gateway = lane.site.gateway
        if hub.board.waiting_total(gateway.slot) >= gateway.admission.queue_max:
            shed = lane.room.latest(wanting.priority, self.request.key.name)
            if shed is None:
                self._report(QUEUE_FULL)
                return
            hub.waiters[shed].shed()
        need = wanting.need
        self.deadline_s = lane.desk.waits_until_s(need, self.started_s, hub.learning.outlooks, self.request.timeout_s)
        promised = gateway.slo is not None or self.request.timeout_s  # to the client, or by it to somebody
        expected_s = hub.clock() + lane.drain.expected_s(len(lane.room) + 1) if promised else 0.0
        if expected_s > self.deadline_s:  # it would only wait in vain
            self._report(Overdue(lane.drain.wait_s(len(lane.room) + 1)))
            return
        self.ticket = Ticket(self.deadline_s, self.request.key.name, need.units, wanting.priority)
        lane.room.join(self.ticket, ahead=self.exchange.moves > 0)
        hub.waiters[self.ticket] = self
        hub.count_waiting(lane, 1)

    def shed(self) -> None:
        """The queue is full, and a request of a higher priority wants its place there."""
        self._stop_waiting()
        self._report(QUEUE_FULL)

    def _stop_waiting(self, served: bool = False) -> None:
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            self.lane.room.leave(ticket, served)
            self.hub.waiters.pop(ticket, None)
            self.hub.count_waiting(self.lane, -1)

    def look_again(self) -> bool:
        """There may be room now; True when it found a place (or ended)."""
        self._report(ROOM)
        return self.ticket is None

    def change_lane(self) -> None:
        """A new Snapshot replaced the Lane this request waits in: look for room in the new one, or wait there."""
        self._stop_waiting()
        self._report(ROOM)

    # --- sending ---

    def _send(self, command: Send) -> None:
        place, now_s = self.place, self.seen_s
        assert place is not None
        peer = self._peer_at(place, now_s)
        self.attempts += 1
        if peer is None:
            self._lost(Failed(Failure.UNREACHABLE, sent=False))
            return
        self.peer = peer
        peer.in_flight += 1
        if peer.health is not HEALTHY and peer.health.breaker is not Breaker.CLOSED:
            self._try_out(peer, now_s)
        self.progress = 0
        limit_s = FIRST_EVENT_MAX_S if self.ask.stream else WHOLE_ANSWER_MAX_S
        self.deadline_s = now_s + limit_s
        self._dispatch(peer, place, fresh=False)

    def _peer_at(self, place: Place, now_s: float) -> Peer | None:
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

    def _try_out(self, peer: Peer, now_s: float) -> None:
        """An Endpoint that was out gets one real request; until it is known how that went, no other."""
        peer.trial = current(peer.health, now_s) is Breaker.HALF_OPEN
        self.hub.tables.renew_fit(peer, now_s)

    def _dispatch(self, peer: Peer, place: Place, fresh: bool) -> None:
        ask, operation = self.ask, self.request.operation
        assert operation is not None
        upstream_name = place.upstream_names[ask.model]
        add_usage = ask.stream and not ask.wants_usage and place.adds_usage and operation.usage_option
        names = self.lane.same_name
        if upstream_name != ask.model:
            names = Names(msgspec.json.encode(upstream_name), names.asked)
        relay = self.relay = Relay(self, operation, add_usage, names)
        if self.request.raw:
            relay.raw = True
        connection = None if fresh else peer.take_idle()
        if connection is None:
            self.hub.spawn(self._connect(peer, place, relay, add_usage, upstream_name))
            return
        relay.connection = connection
        connection.carry(relay, self._request_bytes(peer, place, upstream_name, add_usage))

    def _request_bytes(self, peer: Peer, place: Place, upstream_name: str, add_usage: bool) -> tuple[bytes, ...]:
        body = self.body
        if add_usage or upstream_name != self.ask.model:
            body = openai.rewrite(body, self.ask, upstream_name, add_usage)
        head = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
            place.heads[peer.endpoint.slot][self.request.path],
            self.request.passed,
            self.request_id,
            len(body),
        )
        return (head + body,) if len(body) < 65536 else (head, body)

    async def _connect(self, peer: Peer, place: Place, relay: Relay, add_usage: bool, upstream_name: str) -> None:
        timeout_s = self.lane.site.gateway.resilience.connect_timeout_s
        try:
            connection = await peer.connect(self.hub.loop, timeout_s)
        except ssl.SSLError as error:
            self.hub.note_upstream_trouble(place, f"TLS: {error.reason or error}")
            self._not_connected(relay, Failure.TLS)
            return
        except (OSError, TimeoutError, Refused) as error:
            self.hub.note_upstream_trouble(place, str(error) or "connect timed out")
            self._not_connected(relay, Failure.UNREACHABLE)
            return
        if self.relay is not relay:  # the client left meanwhile, or the deadline passed
            peer.keep(connection, self.hub.clock())
            return
        relay.connection = connection
        connection.carry(relay, self._request_bytes(peer, place, upstream_name, add_usage))

    def _not_connected(self, relay: Relay, failure: Failure) -> None:
        if self.relay is relay:
            self._lost(Failed(failure, sent=False))

    # --- what the relay reports ---

    def on_first(self, relay: Relay) -> None:
        """The first content is here."""
        self._report(CONTENT_OK if relay.status == 200 else Content(relay.status))

    def on_failed(self, relay: Relay, event: Failed) -> None:
        """The attempt is lost."""
        self._lost(event)

    def on_stale(self, relay: Relay) -> None:
        """The kept connection was closed before the request got there: send it again on a new one."""
        assert self.peer is not None and self.place is not None
        self._dispatch(self.peer, self.place, fresh=True)

    def on_ended(self, relay: Relay, tail: bytes) -> None:
        """The answer ended as it should."""
        self.tail += tail
        if self.peer is not None and self.peer.health is not HEALTHY:  # to a healthy one good news is no news
            self._see(Sign.WENT_WELL)
        if self.booking is not None:
            self.hub.learn(self, self.booking, relay)
        elif self.place is not None:
            self.hub.tally(self.place.slot, ENDED)
        self._report(FINISHED)

    def write(self, data: bytes) -> None:
        """Send to the client."""
        if data:
            self.written += len(data)
            self.client.transport.write(data)

    def now_s(self) -> float:
        """The loop's clock."""
        return self.hub.clock()

    def _lost(self, event: Failed) -> None:
        """Settle the attempt's place, tell health, and let the core say what comes next."""
        meters = self.lane.meters.get(self.place.slot) if self.place is not None else None
        if meters is not None:
            self.hub.telemetry.cells[meters.failure(event.failure)] += 1
        if self.place is not None and event.failure is Failure.FULL:
            self.hub.tally(self.place.slot, REFUSED)
        sign = SIGNS.get(event.failure)
        if self.peer is not None:
            self.failed_peers = (*self.failed_peers, self.peer)
            if sign is not None:
                self._see(sign)
        self._settle(self.hub.clock())
        self._report(event)

    def _see(self, sign: Sign) -> None:
        assert self.peer is not None
        if self.peer.saw(sign, self.hub.clock()):
            self.hub.health_changed(self.peer)

    def _settle(self, now_s: float) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.in_flight -= 1
            if peer.trial:
                peer.trial = False
                self.hub.tables.renew_fit(peer, now_s)
        place, self.place = self.place, None
        if place is not None:
            self.lane.drain.ended(now_s)
            booking, self.booking = self.booking, None
            if booking is None:
                self.hub.ledger.settle(place.slot)
            else:
                booking.settle()
            self.hub.room_freed(place.slot)

    # --- what the core says ---

    def _commit(self, command: Commit) -> None:
        relay, place = self.relay, self.place
        assert relay is not None and place is not None
        self.first_s = self.seen_s
        self.status = relay.status
        whole = relay.finish_seen and not relay.stream
        if relay.raw and not whole:
            self.client.keep_alive = False  # only the end of the connection tells an HTTP/1.0 client the length
        head = answers.relayed_head(self, relay, place, len(relay.held[0]) if whole else -1)
        if whole:
            self.tail = head + relay.held[0]
        else:
            self.write(head)
            self.deadline_s = self.first_s + STALL_MAX_S
            if self.booking is not None:
                self.booking.first_token(self.first_s - self.started_s, self.first_s)
                self.hub.prompt_done()

    def _refuse(self, command: Refuse) -> None:
        self._stop_waiting()
        self.status = command.status
        self.write(answers.refusal(self, command))
        self._end(command)

    def _interrupt(self, command: Interrupt) -> None:
        """Never a clean end of an unfinished answer: say so inside the stream, then close without the last chunk."""
        if self.relay is not None and self.relay.raw and not self.relay.stream:
            self.client.transport.abort()  # to HTTP/1.0 a regular close would be a good end
        elif self.relay is not None and self.relay.stream:
            event = openai.error_event("upstream_interrupted", answers.MESSAGES["upstream_interrupted"])
            self.write(event if self.relay.raw else http1.chunk(event))
        self.client.keep_alive = False
        self._end(command)

    def _end(self, command: Command) -> None:
        self._settle(self.seen_s)
        self.write(self.tail)
        self.hub.conversations.pop(self, None)
        self.hub.record(self)
        self.relay = None
        self.client.ended(self.seen_s)

    # --- what ends it from outside ---

    def client_gone(self) -> None:
        """The client left: cancel upstream, in whatever phase."""
        if self.exchange.state is State.ENDED:
            return
        self._stop_waiting()
        if self.relay is not None:
            self.relay.cancel()
        self._report(GONE)

    def overdue(self, now_s: float) -> None:
        """A deadline passed: of waiting, of the first event, or of the next one."""
        relay = self.relay
        if self.exchange.state is State.WAITING:
            self._stop_waiting()
            ahead = max(1, len(self.lane.room))
            self._report(Overdue(self.lane.drain.wait_s(ahead)))
        elif relay is not None and relay.paused:
            self.deadline_s = self.client.still_reads(now_s)  # the client stalls: nothing against the Endpoint
        elif relay is not None:
            relay.cancel()
            self._lost(Failed(Failure.TIMEOUT))

    def watch(self, now_s: float, furthest: dict[int, int]) -> None:
        """Once a second: a committed answer that moved since the last look has its stall limit before it again.

        Shape: `furthest` collects, by Endpoint, the most tokens that one stream got since then.
        """
        relay = self.relay
        if relay is not None and self.booking is not None:
            self.booking.watch(relay.event_count if self.first_s else -1, furthest, now_s)
        if relay is not None and self.first_s and relay.beats + relay.event_count != self.progress:
            self.progress = relay.beats + relay.event_count
            self.deadline_s = now_s + STALL_MAX_S

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
    Pick: Conversation._pick,
    Wait: Conversation._wait,
    Send: Conversation._send,
    Commit: Conversation._commit,
    Refuse: Conversation._refuse,
    Interrupt: Conversation._interrupt,
    Finish: Conversation._end,
}
