"""Connections to one Endpoint: kept alive, reused last in first out, their addresses checked before each dial."""

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import Protocol

from fleetgate.core.model import Endpoint
from fleetgate.protocols.http1 import ChunkedBody, Malformed, ResponseMemo
from fleetgate.proxy.transport import tcp_info
from fleetgate.proxy.transport.dns import Addresses, EgressRule
from fleetgate.proxy.transport.happy_eyeballs import AFTER_S, race
from fleetgate.proxy.transport.network import ClientTls, Network, peer_timeout
from fleetgate.proxy.transport.upstream_tls import UpstreamTls

IDLE_MAX_S = 4.0  # uvicorn, and so vLLM and SGLang, close idle connections after 5 s
IDLE_CONNECTIONS_MAX = 512
TLS_CONNECT_EXTRA_S = 1.0  # faults.md row 2: 1 s to connect, 2 s with TLS
DIAL_SLOW_TIMES = 3.0  # a dial is slow if it takes this many times the usual duration of dials to this Endpoint
DIAL_SLOW_SHARE = 0.5  # or this share of its timeout


class ResponseReader(Protocol):
    """What a connection reports to while it carries a request."""

    def on_data(self, data: bytes) -> None:
        """Bytes came."""

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended; None means by a regular close."""


class FaultInjector(Protocol):
    """Injected faults on one Endpoint; a pool has one only while an operator injects faults."""

    def strikes(self) -> bool:
        """Whether the next request gets a fault, which its `connect` then applies."""

    async def connect(self, pool: "ConnectionPool", network: Network, timeout_s: float) -> "UpstreamConnection | None":
        """A faulty connection, or None for an ordinary one."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to an Endpoint. It carries one request at a time."""

    __slots__ = ("address", "idle_since_s", "pool", "reader", "served", "transport")

    def __init__(self, pool: "ConnectionPool") -> None:
        self.pool = pool
        self.address = ""  # the one that it is connected to
        self.reader: ResponseReader | None = None
        self.transport: asyncio.Transport
        self.served = 0
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        tcp_info.limit_unacknowledged(transport)

    def data_received(self, data: bytes) -> None:
        if self.reader is None:
            # Bytes without a request: the framing is wrong, so the connection must not be used again.
            self.drop()
            return
        self.reader.on_data(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.forget(self)
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.on_lost(error)

    def carry(self, reader: ResponseReader, request: tuple[bytes, ...]) -> None:
        """Send a request and report its response to `reader`."""
        self.reader = reader
        self.served += 1
        for part in request:
            self.transport.write(part)

    def release(self, now_s: float) -> None:
        """The response is complete and the connection clean: keep it."""
        self.reader = None
        self.pool.keep(self, now_s)

    def drop(self) -> None:
        """Close at once, without a report to the reader."""
        self.reader = None
        self.pool.forget(self)
        self.transport.abort()


class BodyDrain:
    """Reads the last chunk after `[DONE]`, so that the connection can be used again.

    The client has the whole response by then and does not wait for it.
    """

    __slots__ = ("_chunked", "_connection")

    def __init__(self, connection: UpstreamConnection, chunked: ChunkedBody | None) -> None:
        self._connection = connection
        self._chunked = chunked
        if chunked is None:
            connection.drop()

    def on_data(self, data: bytes) -> None:
        """Accept only the end of the body."""
        chunked = self._chunked
        try:
            more = chunked.feed(data) if chunked is not None else b""
        except Malformed:
            self._connection.drop()
            return
        if more.strip() or chunked is None or chunked.rest:
            self._connection.drop()
        elif chunked.done:
            self._connection.release(self._connection.idle_since_s)

    def on_lost(self, error: Exception | None) -> None:
        """Do nothing: the response was complete."""


class ConnectionPool:
    """One Endpoint's connections and addresses, with the memo of its last response head."""

    def __init__(self, endpoint: Endpoint, tls: UpstreamTls | None, egress: EgressRule | None) -> None:
        self.endpoint = endpoint
        self.connects = 0
        self.memo = ResponseMemo()
        self.faults: FaultInjector | None = None
        self.addresses = Addresses(endpoint.host, endpoint.port, egress.check if egress is not None else _allow_all)
        self._finishing: set[UpstreamConnection] = set()
        self._idle: list[UpstreamConnection] = []
        self._retired = False
        self._tls = tls
        self._answered_at = ""
        self._dial_s = 0.0  # moving average of the duration of dials, 0 before the first success

    # --- kept connections ---

    def take_idle(self) -> UpstreamConnection | None:
        """The kept connection that was used last; None if a new one must be made."""
        if self.faults is not None and self.faults.strikes():
            return None
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def keep(self, connection: UpstreamConnection, now_s: float) -> None:
        """Keep a clean connection for a later request, or close it if it cannot be used again."""
        self._finishing.discard(connection)
        if self._retired or len(self._idle) >= IDLE_CONNECTIONS_MAX or connection.transport.is_closing():
            connection.drop()
            return
        if connection.address not in self.addresses.current:  # the name no longer resolves to it
            connection.drop()
            return
        connection.idle_since_s = now_s
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """Remove a connection that has ended."""
        self._finishing.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def drain(self, connection: UpstreamConnection, chunked: ChunkedBody | None, now_s: float) -> None:
        """The response is complete but for the end of its framing: keep the connection when that comes."""
        connection.idle_since_s = now_s
        self._finishing.add(connection)
        connection.reader = BodyDrain(connection, chunked)

    def retire(self) -> None:
        """No Snapshot names this Endpoint any more: close kept connections, and each other one after its response."""
        self._retired = True
        self.close_idle(float("inf"))

    def close_idle(self, before_s: float) -> None:
        """Close connections that have been idle since before a moment."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle[0].drop()
        for connection in [late for late in self._finishing if late.idle_since_s < before_s]:
            connection.drop()

    def follow_name(self, now_s: float) -> None:
        """Resolve the name again if that is due, and close kept connections to addresses that it no longer has."""
        self.addresses.refresh(now_s)
        for connection in [idle for idle in self._idle if idle.address not in self.addresses.current]:
            connection.drop()

    # --- new connections ---

    async def connect(self, network: Network, timeout_s: float) -> UpstreamConnection:
        """Connect to one of the Endpoint's addresses; the egress rule is checked before each dial.

        Raises: `OSError` (refused, no address), `TimeoutError`, `ssl.SSLError`, `AddressRefused`.
        """
        faulty = await self.faults.connect(self, network, timeout_s) if self.faults is not None else None
        return faulty or await self.dial(network, timeout_s, lambda: UpstreamConnection(self))

    async def dial(
        self, network: Network, timeout_s: float, make: Callable[[], UpstreamConnection]
    ) -> UpstreamConnection:
        """Connect without injected faults. Raises: as `connect`."""
        self.connects += 1
        loop = asyncio.get_running_loop()
        began_s, limit_s = loop.time(), self._dial_max_s(timeout_s)
        addresses = await self.addresses.get(loop.time(), timeout_s)
        # The address that answered last comes first.
        addresses = sorted(addresses, key=lambda address: address != self._answered_at)
        try:
            connection = await race(
                [partial(self._dial_at, network, address, limit_s, make) for address in addresses],
                UpstreamConnection.drop,
            )
        except ssl.SSLError:
            raise
        except (OSError, TimeoutError):
            self.addresses.refresh(loop.time(), at_once=True)
            raise
        self._answered_at = connection.address
        self._dial_s += 0.25 * (loop.time() - began_s - self._dial_s) if self._dial_s else loop.time() - began_s
        return connection

    def slow_dial_s(self, timeout_s: float) -> float:
        """The duration after which a dial counts as slow and a dial to another Deployment pays."""
        most_s = DIAL_SLOW_SHARE * self._dial_max_s(timeout_s)
        return min(max(AFTER_S, DIAL_SLOW_TIMES * self._dial_s), most_s) if self._dial_s else most_s

    def _dial_max_s(self, timeout_s: float) -> float:
        return timeout_s + (TLS_CONNECT_EXTRA_S if self._tls else 0.0)

    async def _dial_at(
        self, network: Network, address: str, limit_s: float, make: Callable[[], UpstreamConnection]
    ) -> UpstreamConnection:
        tls = ClientTls(self._tls.context, self.endpoint.host) if self._tls else None
        async with peer_timeout(limit_s):
            connection = await network.connect(address, self.endpoint.port, make, tls)
        connection.address = address
        return connection


def _allow_all(host: str, addresses: list[str]) -> None:
    """Without an egress rule: the operator of this machine wrote the Endpoint, so any address is allowed."""
