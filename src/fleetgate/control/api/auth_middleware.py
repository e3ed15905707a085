"""The middleware of the operations port: it checks Host and owner token and adds security headers to responses."""

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetgate.control.api.errors import error_response

_OPEN_PATHS = frozenset({"/api/v1/openapi.json"})
_SAFE_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class AuthMiddleware:
    """ASGI middleware. Shape: `hosts` are the allowed Host names beside localhost and IP addresses."""

    def __init__(self, app: ASGIApp, owner_token: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = owner_token.encode()
        self._hosts = {"localhost", *(host.lower().rstrip(".") for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request or pass it on, and add the security headers to the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        path: str = scope["path"]
        if not self.knows_host(headers.getlist("host")):
            # By DNS rebinding a page of another site reaches this address under its own name, which Host then has.
            refused = error_response(
                421,
                "the Host header names no host of this API; use localhost, the IP address or a name of --api-listen",
            )
            await refused(scope, receive, send_safe)
        elif path.startswith("/api/") and path not in _OPEN_PATHS and not self._is_owner(headers):
            text = "the owner token is missing or wrong; send `Authorization: Bearer` with DATA_DIR/owner-token"
            await error_response(401, text)(scope, receive, send_safe)
        else:
            await self._app(scope, receive, send_safe)

    def knows_host(self, given: list[str]) -> bool:
        """Whether there is one Host header and it names this listener."""
        if len(given) != 1:
            return False
        host = given[0].strip().lower()
        if host.startswith("["):
            host = host[1:].partition("]")[0]
        elif host.count(":") == 1:
            host = host.partition(":")[0]
        if host.rstrip(".") in self._hosts:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _is_owner(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"
