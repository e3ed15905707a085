"""Makes all response heads and errors, so that every response has the documented headers."""

from collections.abc import Callable
from email.utils import formatdate
from zlib import crc32

import msgspec

from fleetgate.core.admission.retry_budget import jittered_s
from fleetgate.core.exchange import Refuse
from fleetgate.protocols.http1 import status_line
from fleetgate.proxy.routing.deployment_state import DeploymentState

OK = status_line(200)
JSON = b"content-type: application/json\r\n"
CLOSE = b"connection: close\r\n"


class ResponseDefaults:
    """The fields that all responses of a worker have.

    Shape: `on_error` logs an internal error; while `draining`, each response is the last one on its connection.
    """

    __slots__ = ("date_line", "draining", "on_error")

    def __init__(self, on_error: Callable[[BaseException, bytes], None]) -> None:
        self.date_line = b""
        self.draining = False
        self.on_error = on_error

    def set_date(self, epoch_s: int) -> None:
        """Renew the date. Once a second."""
        self.date_line = b"date: %b\r\n" % formatdate(epoch_s, usegmt=True).encode()

    def begin_drain(self) -> None:
        """Let each further response close its connection."""
        self.draining = True


class ResponseMeta(msgspec.Struct):
    """The fields of one response's head. Shape: `client_headers` are lines (CORS, `connection: close`)."""

    date_line: bytes
    request_id: bytes
    attempts: int
    client_headers: bytes


RELAYED_HEAD = b"%b%b%b%b%b%bx-request-id: %b\r\nx-fleetgate-attempts: %d\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


def early_head(meta: ResponseMeta, raw: bool, deployment: DeploymentState) -> bytes:
    """The head of a stream before its first event; it names the current attempt."""
    framing = b"" if raw else b"transfer-encoding: chunked\r\n"
    fields = deployment.response_headers + meta.client_headers + framing
    return b"%b%b%b%bx-request-id: %b\r\nx-fleetgate-attempts: %d\r\n\r\n" % (
        OK,
        meta.date_line,
        b"content-type: text/event-stream; charset=utf-8\r\n",
        fields,
        meta.request_id,
        meta.attempts,
    )


def deployment_comment(deployment: DeploymentState, attempts: int) -> bytes:
    """An SSE comment, which SDKs ignore, that names the Deployment if the head named another."""
    spec = deployment.spec
    return b": fleetgate deployment=%b region=%b attempts=%d\n\n" % (
        spec.name.encode(),
        spec.region.encode(),
        attempts,
    )


def refusal(meta: ResponseMeta, refuse: Refuse, content_type: bytes, body: bytes) -> bytes:
    """The gateway's error response to a routed request."""
    extra = b"content-type: %b\r\nx-fleetgate-attempts: %d\r\n" % (content_type, meta.attempts)
    if refuse.retry_after_s:
        wait_s = refuse.retry_after_s
        if refuse.status == 503:
            wait_s = jittered_s(wait_s, crc32(meta.request_id) / 2**32)
        extra += b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (max(1, round(wait_s)), max(1, round(wait_s * 1000)))
    if refuse.should_retry is not None:
        extra += b"x-should-retry: %b\r\n" % (b"true" if refuse.should_retry else b"false")
    return plain(refuse.status, body, meta.date_line, meta.request_id, extra + meta.client_headers)


def plain(status: int, body: bytes, date_line: bytes, request_id: bytes, extra: bytes = JSON) -> bytes:
    """A complete response of the gateway itself. Shape: `extra` are header lines, with the content type."""
    return b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (
        status_line(status),
        date_line,
        len(body),
        request_id,
        extra,
        body,
    )
