"""A toy transport: the built-in one, which also counts its requests and says so on standard error.

Tests put this file into `proxy/transport/`.
"""

import sys

from fleetgate.proxy.transport.asyncio_transport import AsyncioTransport
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.interface import ExpectedResponse, ResponseListener, Spawn
from fleetgate.proxy.transport.network import Network
from fleetgate.proxy.transport.response_relay import ResponseRelay

NAME = "loud"


class LoudTransport(AsyncioTransport):
    """Says what it sends."""

    __slots__ = ("sent",)

    def __init__(self, network: Network, spawn: Spawn) -> None:
        super().__init__(network, spawn)
        self.sent = 0

    def send(
        self,
        pool: ConnectionPool,
        request: tuple[bytes, ...],
        expected: ExpectedResponse,
        listener: ResponseListener,
        *,
        connect_timeout_s: float,
        fresh: bool = False,
    ) -> ResponseRelay:
        """Count, and send."""
        self.sent += 1
        sys.stderr.write(f"loud: request {self.sent} to port {pool.endpoint.port}\n")
        return super().send(pool, request, expected, listener, connect_timeout_s=connect_timeout_s, fresh=fresh)


def make(network: Network, spawn: Spawn) -> LoudTransport:
    """A transport that dials through `network` and runs its coroutines with `spawn`."""
    return LoudTransport(network, spawn)
