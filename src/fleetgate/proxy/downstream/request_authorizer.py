"""Authorizes request heads: Gateway, key and path, decided once per head and Snapshot."""

import ipaddress
import time
from collections.abc import Callable, Sequence

from fleetgate.protocols import error_codes as errors
from fleetgate.protocols.clients.base import ClientProtocol
from fleetgate.protocols.http1 import RequestHead
from fleetgate.protocols.response_headers import EXPOSED_HEADERS
from fleetgate.proxy.downstream.authenticator import Authenticator, may_use
from fleetgate.proxy.downstream.local_responses import RequestRejected
from fleetgate.proxy.request.request_context import RequestContext
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.model_route import GatewayState
from fleetgate.proxy.routing.routing_table import RoutingTable
from fleetgate.proxy.snapshot.key_validity import KeyValidity


class RequestAuthorizer:
    """Authorizes heads. Shape: `cors` are the allowed origins; without `needs_keys` every request is `anonymous`."""

    def __init__(
        self,
        active: ActiveTable,
        authenticator: Authenticator,
        validity: KeyValidity,
        cors: Sequence[str],
        needs_keys: bool,
        clock: Callable[[], float],
    ) -> None:
        self.active = active
        self._authenticator = authenticator
        self._validity = validity
        self._cors = frozenset(cors)
        self._needs_keys = needs_keys
        self._clock = clock

    def authorize(self, head: RequestHead) -> RequestContext:
        """Decide Gateway, key and path, in this order.

        Raises: `RequestRejected`.
        """
        gateway = _gateway_of(head.host, self.active.current)
        try:
            return self._authorize_at(gateway, head)
        except RequestRejected as rejected:
            raise rejected.spoken_in(gateway.protocol) from None

    def _authorize_at(self, gateway: GatewayState, head: RequestHead) -> RequestContext:
        table, protocol = self.active.current, gateway.protocol
        cors = self._cors_headers(head)
        if head.method == b"OPTIONS":
            allow = b"allow: %b\r\n" % protocol.methods_of(head.path)
            raise RequestRejected(204, "options", "", extra=allow + cors)
        key = self._authenticator.find(protocol.authorization_of(head.headers), table)
        if key is None or (key.expires_s and key.expires_s <= time.time()):
            reason = "has expired" if key is not None else "is missing or unknown"
            if key is None and self._validity.stale:
                reason = "cannot be checked: the control plane was silent for longer than --max-stale-s"
            rejection = errors.INVALID_API_KEY.filled(reason=reason, hint=protocol.CREDENTIAL_HINT)
            raise RequestRejected(*rejection, extra=cors)
        if key.require_fresh_s and self._validity.silent_s(self._clock()) > key.require_fresh_s:
            rejection = errors.KEY_NOT_FRESH.filled(seconds=key.require_fresh_s)
            raise RequestRejected(*rejection, extra=cors + b"retry-after: 5\r\n")
        if not may_use(key, gateway.spec):
            raise RequestRejected(*errors.GATEWAY_NOT_ALLOWED.filled(gateway=gateway.spec.name), extra=cors)
        _check_path(head, cors, protocol)
        return RequestContext(head, table, gateway, key, cors)

    def _cors_headers(self, head: RequestHead) -> bytes:
        """The CORS headers for an allowed Origin. Without keys other origins are refused."""
        origin = head.headers.get(b"origin")
        if origin is None:
            return b""
        if "*" in self._cors or origin.decode("latin-1") in self._cors:
            return (
                b"access-control-allow-origin: %b\r\nvary: origin\r\n"
                b"access-control-allow-methods: GET, POST, OPTIONS\r\n"
                b"access-control-allow-headers: authorization, content-type\r\n"
                b"access-control-expose-headers: %b\r\n" % (origin, EXPOSED_HEADERS)
            )
        is_own = origin.partition(b"://")[2] == head.host
        if not self._needs_keys and not is_own:
            raise RequestRejected(*errors.ORIGIN_NOT_ALLOWED.filled())
        return b""


def _check_path(head: RequestHead, cors: bytes, protocol: ClientProtocol) -> None:
    methods = protocol.methods_of(head.path)
    if not methods:
        path = head.path.decode("ascii", "replace")
        rejection = errors.UNKNOWN_PATH.filled(path=path[:200], protocol=protocol.TITLE)
        raise RequestRejected(*rejection, extra=cors)
    if head.method not in methods.split(b", "):
        allow = b"allow: %b\r\n" % methods
        method, known = head.method.decode(), methods.decode()
        rejection = errors.METHOD_NOT_ALLOWED.filled(method=method, allowed=known)
        raise RequestRejected(*rejection, extra=allow + cors)
    encoding = head.headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity"):
        # Never decompressed: a small body may become a very large one. faults.md row 39.
        shown = encoding.decode("ascii", "replace")[:40]
        rejection = errors.BODY_COMPRESSED.filled(encoding=shown)
        raise RequestRejected(*rejection, extra=b"accept-encoding: identity\r\n" + cors)


def _gateway_of(host: bytes, table: RoutingTable) -> GatewayState:
    name = host if host.startswith(b"[") else host.partition(b":")[0]
    gateway = table.gateways.get(name.removesuffix(b"."))
    if gateway is not None:
        return gateway
    if table.default_gateway is not None and (not name or name == b"localhost" or _is_address(name)):
        return table.default_gateway
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
