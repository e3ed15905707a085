"""The bytes of heads and errors that clients get: one place, so that no answer lacks what DESIGN.md promises."""

from typing import TYPE_CHECKING
from zlib import crc32

from fleetgate.core.admission.retry_budget import jittered_s
from fleetgate.core.exchange import Refuse
from fleetgate.protocols.clients import openai
from fleetgate.protocols.error_codes import MESSAGES
from fleetgate.protocols.http1 import status_line
from fleetgate.proxy.routing.routing_table import DeploymentState
from fleetgate.proxy.transport.response_relay import ResponseRelay

if TYPE_CHECKING:
    from fleetgate.proxy.request.handler import RequestHandler
    from fleetgate.proxy.request.response_writer import ResponseWriter

_OK = status_line(200)
JSON = b"content-type: application/json\r\n"
_CLOSE = b"connection: close\r\n"


def relayed_head(conversation: "RequestHandler", relay: ResponseRelay, place: DeploymentState, length: int) -> bytes:
    """The head of an answer that is passed on; `length` is -1 for one whose end is not known yet."""
    client_headers = conversation.request.answer_headers + _closing(conversation)
    if length >= 0:
        framing = b"content-length: %d\r\n" % length
    elif relay.raw:
        framing = b""
    else:
        framing = b"transfer-encoding: chunked\r\n"
    return b"%b%b%b%b%b%bx-request-id: %b\r\nx-fleetgate-attempts: %d\r\n\r\n" % (
        _OK if relay.status == 200 else status_line(relay.status),
        conversation.hub.date_line,
        relay.passed,
        place.answer_headers,
        client_headers,
        framing,
        conversation.request_id,
        conversation.attempts,
    )


def _closing(conversation: "ResponseWriter") -> bytes:
    """What tells the client that this connection's last answer begins: while the worker drains each is one."""
    if conversation.hub.draining:
        conversation.client.keep_alive = False
    return b"" if conversation.client.keep_alive else _CLOSE


def early_head(conversation: "ResponseWriter", place: DeploymentState) -> bytes:
    """The head of a stream whose first event is not here yet; it names the attempt in hand."""
    client_headers = conversation.request.answer_headers + _closing(conversation)
    framing = b"" if conversation.request.raw else b"transfer-encoding: chunked\r\n"
    fields = place.answer_headers + client_headers + framing
    return b"%b%b%b%bx-request-id: %b\r\nx-fleetgate-attempts: %d\r\n\r\n" % (
        _OK,
        conversation.hub.date_line,
        b"content-type: text/event-stream; charset=utf-8\r\n",
        fields,
        conversation.request_id,
        conversation.attempts,
    )


def place_comment(place: DeploymentState, attempts: int) -> bytes:
    """Who answers from here on, where the head named somebody else: a comment, which SDKs ignore."""
    deployment = place.deployment
    return b": fleetgate deployment=%b region=%b attempts=%d\n\n" % (
        deployment.name.encode(),
        deployment.region.encode(),
        attempts,
    )


def refusal(conversation: "RequestHandler", refuse: Refuse) -> bytes:
    """An error of ours after the core has decided."""
    extra = JSON + b"x-fleetgate-attempts: %d\r\n" % conversation.attempts
    if refuse.retry_after_s:
        wait_s = refuse.retry_after_s
        if refuse.status == 503:
            wait_s = jittered_s(wait_s, crc32(conversation.request_id) / 2**32)
        extra += b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (max(1, round(wait_s)), max(1, round(wait_s * 1000)))
    if refuse.should_retry is not None:
        extra += b"x-should-retry: %b\r\n" % (b"true" if refuse.should_retry else b"false")
    body = openai.error_body(refuse.status, refuse.code, MESSAGES[refuse.code])
    extra += conversation.request.answer_headers + _closing(conversation)
    return plain(refuse.status, body, conversation.hub.date_line, conversation.request_id, extra)


def plain(status: int, body: bytes, date_line: bytes, request_id: bytes, extra: bytes = JSON) -> bytes:
    """A whole answer of ours. Shape: `extra` are header lines, with the content type."""
    return b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (
        status_line(status),
        date_line,
        len(body),
        request_id,
        extra,
        body,
    )
