"""From a request's head to what it may do: Gateway, key, path; decided once per head and Snapshot."""

import ipaddress
from typing import TYPE_CHECKING

import msgspec

from fleetgate.core.model import Key
from fleetgate.protocols import error_codes as errors
from fleetgate.protocols.clients import openai
from fleetgate.protocols.http1 import RequestHead
from fleetgate.protocols.response_headers import EXPOSED_HEADERS
from fleetgate.proxy.downstream.authenticator import may_use
from fleetgate.proxy.routing.routing_table import GatewayState, RoutingTable

if TYPE_CHECKING:
    from fleetgate.proxy.worker.services import Hub

TIMEOUT_HEADER_MAX_MS = 3_600_000

SESSION_BYTES_MAX = 128
# What of a client's head an upstream gets to see. FAULTS.md row 80.
_PASSED = (b"accept", b"traceparent", b"tracestate", b"openai-beta", b"x-session-id")


class RequestRejected(Exception):
    """The request ends here with an error of ours. Shape: `extra` are header lines."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, extra: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.extra = extra


class RequestContext:
    """What a head led to."""

    __slots__ = (
        "answer_headers",
        "budget",
        "client_retries",
        "head",
        "idempotency",
        "key",
        "key_json",
        "no_body",
        "operation",
        "passed",
        "path",
        "raw",
        "session",
        "site",
        "tables",
        "timeout_s",
    )

    def __init__(self, head: RequestHead, tables: RoutingTable, site: GatewayState, key: Key) -> None:
        headers = head.headers
        self.head = head
        self.tables = tables
        self.site = site
        self.key = key
        self.key_json = msgspec.json.encode(key.name)
        self.path = head.path
        self.operation = openai.OPERATIONS.get(head.path)
        self.no_body = head.method == b"HEAD"
        self.raw = head.http10
        self.passed = b"".join(b"%b: %b\r\n" % (name, headers[name]) for name in _PASSED if name in headers)
        self.session = headers.get(b"x-session-id", b"")[:SESSION_BYTES_MAX]
        self.answer_headers = b""
        self.budget = site.budget_of(key.name)
        retries = headers.get(b"x-stainless-retry-count", b"")
        self.client_retries = int(retries) if retries.isdigit() and len(retries) < 4 else 0
        self.idempotency = headers.get(b"idempotency-key", b"")
        self.timeout_s = _timeout_s(headers.get(b"x-fleetgate-timeout-ms", b""))


def authorize(head: RequestHead, hub: "Hub") -> RequestContext:
    """Decide Gateway, key and path, in this order.

    Raises: `RequestRejected`.
    """
    tables = hub.tables
    site = _site_of(head.host, tables)
    cors = _cors(head, hub)
    if head.method == b"OPTIONS":
        allow = b"allow: %b\r\n" % _methods_of(head.path)
        raise RequestRejected(204, "options", "", extra=allow + cors)
    key = hub.gatekeeper.find(head.headers.get(b"authorization", b""), tables)
    if key is None or (key.expires_s and key.expires_s <= hub.epoch_s()):
        what = "has expired" if key is not None else "is missing or unknown"
        if key is None and hub.freshness.stale:
            what = "cannot be checked: the control plane was silent for longer than --max-stale-s"
        raise RequestRejected(*errors.INVALID_API_KEY.filled(reason=what), extra=cors)
    if key.require_fresh_s and hub.freshness.silent_s(hub.clock()) > key.require_fresh_s:
        rejection = errors.KEY_NOT_FRESH.filled(seconds=key.require_fresh_s)
        raise RequestRejected(*rejection, extra=cors + b"retry-after: 5\r\n")
    if not may_use(key, site.gateway):
        raise RequestRejected(*errors.GATEWAY_NOT_ALLOWED.filled(gateway=site.gateway.name), extra=cors)
    methods = _methods_of(head.path)
    if not methods:
        path = head.path.decode("ascii", "replace")
        raise RequestRejected(*errors.UNKNOWN_PATH.filled(path=path[:200]), extra=cors)
    if head.method not in methods.split(b", "):
        allow = b"allow: %b\r\n" % methods
        method, known = head.method.decode(), methods.decode()
        raise RequestRejected(*errors.METHOD_NOT_ALLOWED.filled(method=method, allowed=known), extra=allow + cors)
    encoding = head.headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity"):
        # Never inflated: a small body may become a very large one. FAULTS.md row 39.
        shown = encoding.decode("ascii", "replace")[:40]
        rejection = errors.BODY_COMPRESSED.filled(encoding=shown)
        raise RequestRejected(*rejection, extra=b"accept-encoding: identity\r\n" + cors)
    admitted = RequestContext(head, tables, site, key)
    admitted.answer_headers = cors
    return admitted


def _methods_of(path: bytes) -> bytes:
    if path in openai.OPERATIONS:
        return b"POST, OPTIONS"
    if path == openai.MODELS_PATH or path.startswith(openai.MODELS_PATH + b"/"):
        return b"GET, HEAD, OPTIONS"
    return b""


def _site_of(host: bytes, tables: RoutingTable) -> GatewayState:
    name = host if host.startswith(b"[") else host.partition(b":")[0]
    site = tables.sites.get(name.removesuffix(b"."))
    if site is not None:
        return site
    if tables.default is not None and (not name or name == b"localhost" or _is_address(name)):
        return tables.default
    known = "set `default: true` on one Gateway" if _is_address(name) else "use <name>.<domain> of a Gateway"
    shown = name.decode("ascii", "replace")[:200]
    raise RequestRejected(*errors.GATEWAY_NOT_FOUND.filled(host=shown or "an empty Host", fix=known))


def _is_address(host: bytes) -> bool:
    text = host.decode("ascii", "replace")
    text = text[1:].partition("]")[0] if text.startswith("[") else text
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _cors(head: RequestHead, hub: "Hub") -> bytes:
    """The CORS headers for an allowed Origin; without keys a foreign one is refused, for any page could use it."""
    origin = head.headers.get(b"origin")
    if origin is None:
        return b""
    allowed = hub.config.cors
    if "*" in allowed or origin.decode("latin-1") in allowed:
        return (
            b"access-control-allow-origin: %b\r\nvary: origin\r\naccess-control-allow-methods: GET, POST, OPTIONS\r\n"
            b"access-control-allow-headers: authorization, content-type\r\n"
            b"access-control-expose-headers: %b\r\n" % (origin, EXPOSED_HEADERS)
        )
    own = origin.partition(b"://")[2] == head.host
    if hub.config.auth == "none" and not own:
        raise RequestRejected(*errors.ORIGIN_NOT_ALLOWED.filled())
    return b""


def _timeout_s(value: bytes) -> float:
    """The client's deadline; 0 for none or one that makes no sense. Out of range counts as absent, never as urgent."""
    if not value.isdigit() or len(value) > 9:
        return 0.0
    timeout_ms = int(value)
    return timeout_ms / 1000 if 0 < timeout_ms <= TIMEOUT_HEADER_MAX_MS else 0.0
