"""Requests that engines died of: found out before a third engine gets one."""

import asyncio
import ssl
from typing import TYPE_CHECKING

from fleetgate.core.exchange import AttemptFailed, Failure
from fleetgate.core.health.poison_request import TOGETHER_S, LostAttempt, is_poison, is_suspicious
from fleetgate.proxy.health import event_messages as sentences
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.dns import AddressRefused

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler
    from fleetgate.proxy.worker.services import Hub

DYING_S = 0.05  # a process that ends closes its connections before it ceases to listen
DEAD_TIMEOUT_S = 0.5
BAD_REQUEST = 400


class PoisonDetector:
    """Looks into losses that a request may itself be the reason for."""

    def __init__(self, hub: "Hub") -> None:
        self._hub = hub

    def holds(self, conversation: "RequestHandler", event: AttemptFailed) -> bool:
        """Whether a loss is held back until it is known if the engine died of this request, as one before did."""
        possible = event.failure in (Failure.BROKEN, Failure.UNREACHABLE) and not conversation.first_s
        if not possible or not conversation.failed_peers:
            return False
        peer, relay = conversation.failed_peers[-1], conversation.relay
        if event.failure is Failure.BROKEN:
            reset = event.sent and relay is not None and relay.status < BAD_REQUEST
        else:  # closed under it at once, so that it looked like a connection kept too long; then refused
            reset = conversation.stale_at is peer
        if not reset or peer in conversation.deaths or not is_suspicious(self._loss(conversation, peer)):
            return False
        hub = self._hub
        conversation.deaths = {**conversation.deaths, peer: hub.loop.create_task(self._is_dead(peer))}
        if not is_poison(len(conversation.deaths)):
            return False
        conversation.deadline_s = float("inf")
        hub.spawn(self._judge(conversation, event))
        return True

    def _loss(self, conversation: "RequestHandler", peer: EndpointState) -> LostAttempt:
        """Cost: a look at every request in flight, for the first loss at an Endpoint and not for those with it."""
        now_s, hub = self._hub.clock(), self._hub
        since_s, peer.lost_s = now_s - peer.lost_s, now_s
        alone = since_s > TOGETHER_S
        others = [one for one in hub.conversations if one.peer is peer and one is not conversation] if alone else []
        waiting = sum(not one.first_s for one in others)
        answered = any(place.ended for place in hub.tables.places_of.get(peer, ()))
        return LostAttempt(True, waiting, answered or len(others) > waiting, since_s)

    async def _is_dead(self, peer: EndpointState) -> bool:
        """Whether nobody listens there any more."""
        await asyncio.sleep(DYING_S)
        try:
            connection = await peer.pool.connect(self._hub.network, DEAD_TIMEOUT_S)
        except ssl.SSLError:
            return False
        except (OSError, TimeoutError, AddressRefused):
            return True
        connection.drop()
        return False

    async def _judge(self, conversation: "RequestHandler", event: AttemptFailed) -> None:
        hub = self._hub
        died = sum(await asyncio.gather(*conversation.deaths.values()))
        if is_poison(died):
            event = AttemptFailed(Failure.POISON)
            origins = [peer.endpoint.origin for peer in conversation.deaths]
            place = conversation.last_place
            if place is not None:
                sentence = sentences.poison_sentence(conversation.request_id.decode(), origins)
                hub.ward.tell(place, "poison", sentence)
        conversation.judged(event)
