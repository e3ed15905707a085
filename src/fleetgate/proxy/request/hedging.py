"""A second attempt beside a slow first one: whoever brings the first content answers, the other is cancelled.

Where the first has no connection yet, whoever is connected first gets the request, and the other never does.
"""

from typing import TYPE_CHECKING

from fleetgate.core.exchange import AttemptFailed
from fleetgate.core.health.hedge_policy import has_spare_capacity, may_hedge
from fleetgate.core.routing.scheduler import Placement
from fleetgate.proxy.request import attempt as sending
from fleetgate.proxy.request.reservation import PlacementRequest, Reservation
from fleetgate.proxy.request.usage import HEDGED
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.connection_pool import EndpointState
from fleetgate.proxy.transport.response_relay import ResponseRelay

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler


class Hedge:
    """One attempt that runs beside a conversation's own until one of the two is first."""

    def __init__(
        self, conversation: "RequestHandler", placed: Placement, place: DeploymentState, peer: EndpointState
    ) -> None:
        hub = conversation.hub
        self.conversation = conversation
        self.place = place
        self.peer = peer
        self.booking = Reservation(hub, placed, conversation.lane.desk.has_slo, hub.clock())
        peer.in_flight += 1
        self.attempt = b"%b-%d" % (conversation.request_id, conversation.attempts)
        hub.accounts.begin(conversation, place, self.attempt)
        self.relay = sending.relay_for(conversation, self, place)
        sending.send(conversation, self.relay, peer, place)

    # --- what its relay reports ---

    def on_first(self, relay: ResponseRelay) -> None:
        """It is first: from here on it is the conversation's attempt."""
        self.conversation.adopt(self)
        self.conversation.on_first(relay)

    def on_failed(self, relay: ResponseRelay, event: AttemptFailed) -> None:
        """It is lost, of which only the books hear: the other one still runs."""
        self.conversation.hedge = None
        self.conversation.blame(self.peer, event.failure)
        self.settle(event.failure.value.encode())

    def on_stale(self, relay: ResponseRelay) -> None:
        """A kept connection was closed: once more on a new one."""
        self.attempt = self.conversation.hub.accounts.again(self.conversation, self.place, self.attempt)
        self.relay = sending.relay_for(self.conversation, self, self.place)
        sending.send(self.conversation, self.relay, self.peer, self.place, fresh=True)

    def on_ended(self, relay: ResponseRelay, tail: bytes) -> None:
        """Never: nothing ends before its first content, and with that it changes its owner."""
        raise AssertionError("an attempt that nobody adopted has ended")

    def write(self, data: bytes) -> None:
        """Never, for the same reason."""
        raise AssertionError("an attempt that nobody adopted has written")

    def now_s(self) -> float:
        """The loop's clock."""
        return self.conversation.hub.clock()

    # --- its ends ---

    def cancel(self) -> None:
        """The other one was first, or the client left."""
        self.relay.cancel()
        self.settle(HEDGED)

    def settle(self, how: bytes) -> None:
        """Give its place back."""
        self.conversation.hub.accounts.lost(self.conversation, self.attempt, self.relay, how)
        self.peer.in_flight -= 1
        self.booking.settle()
        self.conversation.hub.room_freed(self.place.slot)


def try_hedge(conversation: "RequestHandler", now_s: float) -> Hedge | None:
    """Send a second attempt if the first is slow, there is room to spare and the budget has something left."""
    hub, lane, wanting = conversation.hub, conversation.lane, conversation.wanting
    gateway = lane.site.gateway
    if wanting is None or not may_hedge(gateway.resilience.hedge, wanting.priority):
        return None
    if now_s - conversation.started_s < lane.first_tokens.threshold_s(wanting.need.prompt_tokens):
        return None
    lane.desk.loads.refresh(hub.learning.outlooks, hub.books, now_s)
    if not has_spare_capacity(lane.desk.loads.load.values()) or not conversation.request.budget.take(now_s):
        return None
    return _beside(conversation, wanting, now_s)


def dial_elsewhere(conversation: "RequestHandler", now_s: float) -> Hedge | None:
    """Dial somebody else too: whoever has a connection first gets the request, so that no engine gets more of them.

    As a first move does, the first of these comes out of no budget.
    """
    exchange = conversation.exchange
    if exchange.moves and not conversation.request.budget.take(now_s):
        return None
    wanting = conversation.wanting = conversation.wanting or PlacementRequest(conversation)
    hedge = _beside(conversation, wanting, now_s)
    exchange.moves += hedge is not None
    return hedge


def _beside(conversation: "RequestHandler", wanting: PlacementRequest, now_s: float) -> Hedge | None:
    hub, lane = conversation.hub, conversation.lane
    wish = wanting.wish(0.0)  # a new attempt has its whole TTFT before it
    placed = lane.desk.place(wish, hub.learning.outlooks, hub.books, now_s, conversation.exchange.tried)
    if not isinstance(placed, Placement):
        return None
    place = hub.tables.places[placed.candidate.slot]
    peer = place.peer_at(placed.reservation.endpoint_slot)
    if peer is None or conversation.ask.model not in place.upstream_names:
        hub.books.settle(placed.reservation)
        return None
    conversation.exchange.record_hedge(placed.candidate)
    conversation.attempts += 1
    return Hedge(conversation, placed, place, peer)
