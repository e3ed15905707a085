"""A request on its way to an Endpoint: its bytes there, and a connection for them where none is kept."""

from typing import TYPE_CHECKING

import msgspec

from fleetgate.protocols.clients import openai
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.interface import ExpectedResponse, ModelNames, UpstreamResponse

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


def send(
    conversation: "RequestHandler", peer: EndpointState, place: DeploymentState, fresh: bool = False
) -> UpstreamResponse:
    """Send the request on a kept connection, or on a new one if none is kept or it must be `fresh`."""
    ask, operation, resumption = conversation.ask, conversation.request.operation, conversation.resumption
    assert operation is not None
    upstream_name = place.upstream_names[ask.model]
    add_usage = ask.stream and not ask.wants_usage and place.adds_usage and operation.usage_option
    names = conversation.lane.same_name
    if upstream_name != ask.model:
        names = ModelNames(msgspec.json.encode(upstream_name), names.asked)
    response = conversation.hub.transport.send(
        peer.pool,
        request_bytes(conversation, peer, place, add_usage),
        ExpectedResponse(
            operation,
            add_usage,
            names,
            not ask.stream,
            ask.several and ask.stream and resumption is None,
            conversation.request.raw,
            None if resumption is None else resumption.resumed_stream(operation),
        ),
        conversation,
        connect_timeout_s=conversation.lane.site.gateway.resilience.connect_timeout_s,
        fresh=fresh,
    )
    if not response.is_connected:
        conversation.dials = {**conversation.dials, response: (place, peer)}
    elif resumption is not None and conversation.client.unread:
        response.pause()
    return response
