"""The values of a request: its authorized head, and what its body asks for."""

from typing import Protocol

import msgspec

from fleetgate.core.admission.retry_budget import KeyBudget
from fleetgate.core.model import Key
from fleetgate.core.routing.policy_decision import ALLOWED, PolicyDecision
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.http1 import RequestHead
from fleetgate.protocols.messages import Operation, RequestInfo
from fleetgate.proxy.routing.model_route import GatewayState, ModelRouteState
from fleetgate.proxy.routing.routing_table import RoutingTable

TIMEOUT_HEADER_MAX_MS = 3_600_000
SESSION_BYTES_MAX = 128


class RequestContext:
    """The result of authorizing a head. It is kept with the head, so that equal heads are authorized once.

    Shape: `forwarded_headers` are lines for the upstream, `response_headers` (CORS) lines for the client;
    `timeout_s` is 0 if the client set none; `raw` marks HTTP/1.0, which has no chunked framing.
    """

    __slots__ = (
        "budget",
        "client_retries",
        "forwarded_headers",
        "gateway",
        "head",
        "idempotency_key",
        "key",
        "key_json",
        "no_body",
        "operation",
        "path",
        "protocol",
        "raw",
        "response_headers",
        "session",
        "table",
        "timeout_s",
    )

    def __init__(
        self, head: RequestHead, table: RoutingTable, gateway: GatewayState, key: Key, response_headers: bytes
    ) -> None:
        headers = head.headers
        self.head = head
        self.table = table
        self.gateway = gateway
        self.key = key
        self.key_json = msgspec.json.encode(key.name)
        self.path = head.path
        self.protocol: ClientProtocol = gateway.protocol
        self.operation: Operation | None = gateway.protocol.OPERATIONS.get(head.path)
        self.no_body = head.method == b"HEAD"
        self.raw = head.http10
        self.forwarded_headers = gateway.protocol.request_headers(headers)
        self.session = headers.get(b"x-session-id", b"")[:SESSION_BYTES_MAX]
        self.response_headers = response_headers
        self.budget: KeyBudget = gateway.budget_of(key.name)
        retries = headers.get(b"x-stainless-retry-count", b"")
        self.client_retries = int(retries) if retries.isdigit() and len(retries) < 4 else 0
        self.idempotency_key = headers.get(b"idempotency-key", b"")
        self.timeout_s = _timeout_s(headers.get(b"x-fleetgate-timeout-ms", b""))


def _timeout_s(value: bytes) -> float:
    """The client's deadline. An absent, malformed or out-of-range value is 0: it must not make a request urgent."""
    if not value.isdigit() or len(value) > 9:
        return 0.0
    timeout_ms = int(value)
    return timeout_ms / 1000 if 0 < timeout_ms <= TIMEOUT_HEADER_MAX_MS else 0.0


class FinalResponse(msgspec.Struct, frozen=True):
    """The end of a response, for the idempotency store. Shape: `headers` are lines; `body` is None if not kept."""

    ok: bool
    stream: bool
    size_bytes: int
    headers: bytes
    body: bytes | None


class Claim(Protocol):
    """The claim of a request on its `Idempotency-Key`."""

    def end(self, response: FinalResponse) -> None:
        """The request has ended."""


class ReceivedRequest(msgspec.Struct):
    """A complete request, authorized and allowed by policies."""

    context: RequestContext
    operation: Operation
    route: ModelRouteState
    info: RequestInfo
    body: bytes
    decision: PolicyDecision = ALLOWED
    claim: Claim | None = None
