"""A request on its way to an Endpoint: its bytes there, and a connection for them where none is kept."""

import ssl
from typing import TYPE_CHECKING

from fleetgate.core.exchange import Failure
from fleetgate.protocols import openai
from fleetgate.proxy.tables import Place
from fleetgate.proxy.transport.relay import Relay
from fleetgate.proxy.transport.upstream import Peer, Refused, UpstreamConnection

if TYPE_CHECKING:
    from fleetgate.proxy.conversation import Conversation

ONE_WRITE_BYTES_MAX = 65536  # up to it, joining head and body costs less than a second write


def request_bytes(conversation: "Conversation", peer: Peer, place: Place, add_usage: bool) -> tuple[bytes, ...]:
    """The request as this Endpoint gets it: its own name for the model, and what was said, if an answer goes on."""
    ask, body = conversation.ask, conversation.body
    if conversation.resumption is not None:
        body = conversation.resumption.body(body, place.deployment.engine)
    upstream_name = place.upstream_names[ask.model]
    if add_usage or upstream_name != ask.model:
        body = openai.rewrite(body, ask, upstream_name, add_usage)
    head = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
        place.heads[peer.endpoint.slot][conversation.request.path],
        conversation.request.passed,
        conversation.request_id,
        len(body),
    )
    return (head + body,) if len(body) < ONE_WRITE_BYTES_MAX else (head, body)


async def connect(conversation: "Conversation", peer: Peer, place: Place, relay: Relay) -> None:
    """Make a connection and send on it; why that failed goes to the log, that it did to the conversation."""
    hub = conversation.hub
    timeout_s = conversation.lane.site.gateway.resilience.connect_timeout_s
    try:
        connection = await peer.connect(hub.loop, timeout_s)
    except ssl.SSLError as error:
        hub.note_upstream_trouble(place, f"TLS: {error.reason or error}")
        conversation.not_connected(relay, Failure.TLS)
        return
    except (OSError, TimeoutError, Refused) as error:
        hub.note_upstream_trouble(place, str(error) or "connect timed out")
        conversation.not_connected(relay, Failure.UNREACHABLE)
        return
    if conversation.relay is not relay:  # the client left meanwhile, or the deadline passed
        peer.keep(connection, hub.clock())
        return
    carry(conversation, connection, relay, request_bytes(conversation, peer, place, relay.hide_usage))


def carry(
    conversation: "Conversation", connection: UpstreamConnection, relay: Relay, request: tuple[bytes, ...]
) -> None:
    """Send it; where an answer goes on, its client may be behind with reading."""
    relay.connection = connection
    connection.carry(relay, request)
    if conversation.resumption is not None and conversation.client.unread:
        conversation.pause()
