"""A request looks for a place: the Lane's lead takes it, or whom the strategy names, or it waits for one."""

from typing import TYPE_CHECKING

from fleetgate.core.admission.request_queue import QueueEntry
from fleetgate.core.exchange import NotPicked, Pick, Picked, QueueFull, QueueTimeout, Wait
from fleetgate.core.routing.route import Rejection, RejectionReason
from fleetgate.proxy.request.reservation import PlacementRequest, Reservation
from fleetgate.proxy.routing.routing_table import ModelRouteState

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler

COOLS_WAIT_MAX_S = 2.0  # FAULTS.md row 16: in place only for so long
QUEUE_FULL = QueueFull()
LOST = (RejectionReason.NONE_UP, RejectionReason.ALL_TRIED)  # unless somebody who is out proves better than thought


def pick(conversation: "RequestHandler", command: Pick) -> None:
    """Look for a place, and report what came of it."""
    hub, lane = conversation.hub, conversation.lane
    if lane.tables is not hub.tables:
        lane = conversation.lane = hub.tables.lane_after(lane)
    lead = lane.lead
    if lead is not None and not command.tried and not lane.room:
        place = hub.tables.places[lead.slot]
        if place.fit >= 1.0 and not place.foreign and not place.paused and hub.ledger.reserve(lead.slot, place.limit):
            conversation.place = conversation.last_place = place
            conversation.report(Picked(lead))
            return
    _pick_by_route(conversation, command, lane)


def _pick_by_route(conversation: "RequestHandler", command: Pick, lane: ModelRouteState) -> None:
    hub, now_s = conversation.hub, conversation.hub.clock()
    wanting = conversation.wanting = conversation.wanting or PlacementRequest(conversation)
    first = lane.room.first() if conversation.ticket is None and not command.tried else None
    if first is not None and first.priority <= wanting.priority:
        conversation.report(NotPicked(RejectionReason.ALL_FULL))  # others wait already, and newcomers go behind them
        return
    tried = _exhausted(conversation, command.tried, now_s) if command.tried else ()
    if lane.missing:
        tried = [*tried, *lane.lacking(conversation.request.path, now_s)]
    if conversation.resumption is not None:
        tried = [*tried, *conversation.resumption.unfit(lane, hub.tables)]
    wish = wanting.wish(now_s - conversation.wants_since_s)
    placed = lane.desk.place(wish, hub.learning.outlooks, hub.books, now_s, tried)
    if hub.recorder is not None:
        considered = conversation.lane.desk.last_decision
        if considered is not None:  # it is None for a Lane that a new Snapshot has just emptied
            gateway, key = conversation.lane.site.gateway.name, conversation.request.key.name
            identity = hub.recorder.identity(conversation.request_id, gateway, conversation.lane.model, key)
            hub.recorder.decided(identity, considered, wish, tried, placed)
    if isinstance(placed, Rejection):
        why = lane.why(placed.reason, tried, conversation.wants_since_s, now_s)
        if why in LOST and hub.ward.try_least_bad(lane, now_s, tried):
            pick(conversation, command)
        else:
            conversation.report(NotPicked(why))
        return
    conversation.place = conversation.last_place = hub.tables.places[placed.candidate.slot]
    conversation.booking = Reservation(hub, placed, lane.desk.has_slo, now_s)
    lane.affinity.record(wanting.chain, placed.reservation.endpoint_slot)
    if conversation.ticket is not None:
        stop_waiting(conversation, served=True)
    conversation.report(Picked(placed.candidate))


def _exhausted(conversation: "RequestHandler", slots: tuple[int, ...], now_s: float) -> list[int]:
    """Those of the Deployments tried that have no other Endpoint to try."""
    places, failed = conversation.hub.tables.places, conversation.failed_peers
    return [slot for slot in slots if slot not in places or not places[slot].choose(now_s, failed)]


def wait(conversation: "RequestHandler", command: Wait) -> None:
    """Join the row, unless it is full or the wait would be in vain."""
    if conversation.ticket is not None:
        return  # woken in vain: it keeps its place in the row
    hub, lane, wanting = conversation.hub, conversation.lane, conversation.wanting
    assert wanting is not None
    gateway, request = lane.site.gateway, conversation.request
    cools_s = lane.cools_s(hub.clock())
    if cools_s > COOLS_WAIT_MAX_S:  # nobody will take it before, so its client hears of it now
        conversation.report(QueueTimeout(cools_s))
        return
    if hub.board.waiting_total(gateway.slot) >= gateway.admission.queue_max:
        shed = lane.room.shed_candidate(wanting.priority, request.key.name)
        if shed is None:
            conversation.report(QUEUE_FULL)
            return
        hub.waiters[shed].shed()
    need, outlooks = wanting.need, hub.learning.outlooks
    conversation.deadline_s = lane.desk.queue_deadline_s(need, conversation.wants_since_s, outlooks, request.timeout_s)
    promised = gateway.slo is not None or request.timeout_s  # to the client, or by it to somebody
    expected_s = hub.clock() + lane.drain.wait_expected_s(len(lane.room) + 1) if promised else 0.0
    if expected_s > conversation.deadline_s:  # it would only wait in vain
        conversation.report(QueueTimeout(lane.drain.retry_after_s(len(lane.room) + 1)))
        return
    conversation.ticket = QueueEntry(conversation.deadline_s, request.key.name, need.units, wanting.priority)
    lane.room.join(conversation.ticket, ahead=conversation.exchange.moves > 0)
    hub.waiters[conversation.ticket] = conversation
    hub.count_waiting(lane, 1)


def stop_waiting(conversation: "RequestHandler", served: bool = False) -> None:
    """Leave the row, if it waits."""
    ticket, conversation.ticket = conversation.ticket, None
    if ticket is not None:
        conversation.lane.room.leave(ticket, served)
        conversation.hub.waiters.pop(ticket, None)
        conversation.hub.count_waiting(conversation.lane, -1)
