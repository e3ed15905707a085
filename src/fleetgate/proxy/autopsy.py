"""Requests that end the engines that serve them: seen twice, such a request is not tried again.

An engine that breaks while a request is the newest in it may have broken because of it. If then nobody listens there
any more, and the same happens at a second one, a third is not risked. Class "poison" of DESIGN.md section 5.
"""

from typing import TYPE_CHECKING

from fleetgate.core.exchange import Failed, Failure, State
from fleetgate.proxy.transport.upstream import Peer

if TYPE_CHECKING:
    from fleetgate.proxy.conversation import Conversation

LOOK_S = 1.0
DEATHS = 2


def examine(conversation: "Conversation", peer: Peer, event: Failed) -> None:
    """Look whether the engine is gone: beside the next attempt for the first one, before it for the second."""
    conversation.suspicions += 1
    if conversation.suspicions < DEATHS:
        conversation.hub.spawn(_look(conversation, peer))
        conversation.report(event)
        return
    conversation.relay = None
    conversation.deadline_s = float("inf")
    conversation.hub.spawn(_look_first(conversation, peer, event))


async def _look(conversation: "Conversation", peer: Peer) -> None:
    conversation.deaths += await peer.is_dead(conversation.hub.loop, LOOK_S)


async def _look_first(conversation: "Conversation", peer: Peer, event: Failed) -> None:
    before = conversation.exchange.state
    await _look(conversation, peer)
    if before is not State.ENDED and conversation.exchange.state is before:  # its client may have left meanwhile
        conversation.report(Failed(Failure.POISON) if conversation.deaths >= DEATHS else event)
