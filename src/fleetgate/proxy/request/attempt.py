"""A request on its way to an Endpoint: its bytes there, and a connection for them where none is kept."""

import ssl
from typing import TYPE_CHECKING

import msgspec

from fleetgate.core.exchange import Failure
from fleetgate.protocols.clients import openai
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.connection_pool import AddressRefused, EndpointState, UpstreamConnection
from fleetgate.proxy.transport.response_relay import AttemptListener, ModelNames, ResponseRelay

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler

ONE_WRITE_BYTES_MAX = 65536  # up to it, joining head and body costs less than a second write


def request_bytes(
    conversation: "RequestHandler", peer: EndpointState, place: DeploymentState, add_usage: bool
) -> tuple[bytes, ...]:
    """The request as this Endpoint gets it: its own name for the model, and what was said, if an answer goes on."""
    ask, body, path = conversation.ask, conversation.body, conversation.request.path
    if conversation.resumption is not None:
        path = conversation.resumption.path(path)
        body = conversation.resumption.body(body, place.deployment.engine)
    upstream_name = place.upstream_names[ask.model]
    if add_usage or upstream_name != ask.model:
        body = openai.rewrite(body, ask, upstream_name, add_usage)
    head = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (
        place.heads[peer.endpoint.slot][path],
        conversation.request.passed,
        conversation.request_id,
        len(body),
    )
    return (head + body,) if len(body) < ONE_WRITE_BYTES_MAX else (head, body)


def relay_for(conversation: "RequestHandler", owner: AttemptListener, place: DeploymentState) -> ResponseRelay:
    """Who reads the answer of an attempt at this Deployment."""
    ask, operation = conversation.ask, conversation.request.operation
    assert operation is not None
    upstream_name = place.upstream_names[ask.model]
    add_usage = ask.stream and not ask.wants_usage and place.adds_usage and operation.usage_option
    names = conversation.lane.same_name
    if upstream_name != ask.model:
        names = ModelNames(msgspec.json.encode(upstream_name), names.asked)
    if conversation.resumption is None:
        relay = ResponseRelay(owner, operation, add_usage, names)
        relay.wants_whole = not ask.stream
        if ask.several and ask.stream:
            relay.choices, relay.operation = {}, msgspec.structs.replace(operation, fast_mark=b"\x00")  # each is read
    else:
        relay = conversation.resumption.relay(owner, operation, add_usage, names)
    if conversation.request.raw:
        relay.raw = True
    return relay


def send(
    conversation: "RequestHandler",
    relay: ResponseRelay,
    peer: EndpointState,
    place: DeploymentState,
    fresh: bool = False,
) -> None:
    """Send the request on a kept connection, or on a new one where there is none or it must be `fresh`."""
    connection = None if fresh else peer.take_idle()
    if connection is None:
        conversation.hub.spawn(_connect(conversation, peer, place, relay))
    else:
        _carry(conversation, connection, relay, request_bytes(conversation, peer, place, relay.hide_usage))


async def _connect(
    conversation: "RequestHandler", peer: EndpointState, place: DeploymentState, relay: ResponseRelay
) -> None:
    """Make a connection and send on it; why that failed goes to the log, that it did to who owns the attempt."""
    hub = conversation.hub
    timeout_s = conversation.lane.site.gateway.resilience.connect_timeout_s
    slow = hub.loop.call_later(peer.slow_dial_s(timeout_s), conversation.dials_long, relay)
    failure = None
    try:
        connection = await peer.connect(hub.loop, timeout_s)
    except ssl.SSLError as error:
        failure, why = Failure.TLS, f"TLS: {error.reason or error}"
    except (OSError, TimeoutError, AddressRefused) as error:
        failure, why = Failure.UNREACHABLE, str(error) or "connect timed out"
    finally:
        slow.cancel()
    if failure is not None:
        hub.note_upstream_trouble(place, why)
        if relay.over:  # somebody else was quicker; that nobody can be reached here is worth knowing all the same
            hub.ward.unreachable(conversation.lane, place, peer, failure)
        else:
            relay.not_connected(failure)
        return
    if relay.over:  # somebody else was quicker, the client left, or the deadline passed
        peer.keep(connection, hub.clock())
        return
    conversation.connected(relay)
    _carry(conversation, connection, relay, request_bytes(conversation, peer, place, relay.hide_usage))


def _carry(
    conversation: "RequestHandler", connection: UpstreamConnection, relay: ResponseRelay, request: tuple[bytes, ...]
) -> None:
    """Send it; where an answer goes on, its client may be behind with reading."""
    relay.connection = connection
    connection.carry(relay, request)
    if conversation.resumption is not None and conversation.client.unread:
        conversation.pause()
