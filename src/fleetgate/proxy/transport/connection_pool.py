"""Connections to Endpoints: kept alive, checked before each dial, reused last-in first-out."""

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import Protocol

from fleetgate.core.capacity.units import SLOW_START_MIN, slow_start
from fleetgate.core.health.circuit_breaker import (
    HEALTHY,
    BreakerState,
    EndpointHealth,
    Signal,
    current_state,
    next_health,
)
from fleetgate.core.health.outlier_detection import LatencyOutlier
from fleetgate.core.model import Endpoint
from fleetgate.protocols.http1 import ResponseMemo
from fleetgate.proxy.downstream.server_tls import UpstreamTls
from fleetgate.proxy.transport import tcp_info as tcp
from fleetgate.proxy.transport.dns import Addresses, AddressRefused, EgressRule
from fleetgate.proxy.transport.happy_eyeballs import AFTER_S as RACE_AFTER_S
from fleetgate.proxy.transport.happy_eyeballs import race

__all__ = ["AddressRefused", "EgressRule", "EndpointState", "FaultInjector", "ResponseReader", "UpstreamConnection"]

IDLE_MAX_S = 4.0  # uvicorn, and so vLLM and SGLang, close idle connections after 5 s
IDLE_CONNECTIONS_MAX = 512
TLS_CONNECT_EXTRA_S = 1.0  # FAULTS.md row 2: connect 1 s, with TLS 2 s
DIAL_SLOW_TIMES = 3.0  # a dial that takes so many times what dials here usually take is slow
DIAL_SLOW_SHARE = 0.5  # and so is one that takes this part of its limit


class ResponseReader(Protocol):
    """What a connection needs of the attempt it carries."""

    def on_data(self, data: bytes) -> None:
        """Bytes came."""

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended; None means by a regular close."""


class FaultInjector(Protocol):
    """Injected faults on one Endpoint. There is none unless an operator asked for it: `transport/harm.py`."""

    def strikes(self) -> bool:
        """Whether the request that wants a connection is to be struck: its next `connect` then is."""

    async def connect(
        self, peer: "EndpointState", loop: asyncio.AbstractEventLoop, timeout_s: float
    ) -> "UpstreamConnection | None":
        """A connection that does harm, or None for an ordinary one."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to an Endpoint, carrying one attempt at a time."""

    __slots__ = ("address", "attempt", "idle_since_s", "peer", "served", "transport")

    def __init__(self, peer: "EndpointState") -> None:
        self.peer = peer
        self.address = ""  # that it was dialled at
        self.attempt: ResponseReader | None = None
        self.transport: asyncio.Transport
        self.served = 0
        self.idle_since_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        tcp.limit_unacknowledged(transport)

    def data_received(self, data: bytes) -> None:
        if self.attempt is None:
            # Bytes that nobody asked for: the framing is off, and the connection must not be used again.
            self.drop()
            return
        self.attempt.on_data(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.peer.forget(self)
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            attempt.on_lost(error)

    def carry(self, attempt: ResponseReader, request: tuple[bytes, ...]) -> None:
        """Send a request and hand its answer to `attempt`."""
        self.attempt = attempt
        self.served += 1
        for part in request:
            self.transport.write(part)

    def release(self, now_s: float) -> None:
        """The answer is whole and the connection clean: keep it."""
        self.attempt = None
        self.peer.keep(self, now_s)

    def drop(self) -> None:
        """Close at once; the attempt, if any, is not told."""
        self.attempt = None
        self.peer.forget(self)
        self.transport.abort()


class EndpointState:
    """One Endpoint as this worker knows it: its idle connections, addresses and health."""

    def __init__(self, endpoint: Endpoint, tls: UpstreamTls | None, allow: "EgressRule | None") -> None:
        self.endpoint = endpoint
        self.health: EndpointHealth = HEALTHY
        self.in_flight = 0
        self.trials = 0  # half open: real requests under way that have brought nothing yet
        self.trial_s = float("-inf")  # when the last of them was sent
        self.shown = 0  # half open: how many have brought content
        self.connects = 0
        self.probe_seen_ms = 0
        self.adopted = 0  # the last that another worker told of it, or this one the others
        self.lost_s = float("-inf")  # when a request that waited for its first content was last lost here
        self.panicked_s = float("-inf")  # when it was last tried because everybody was out
        self.slowness: dict[
            int, LatencyOutlier
        ] = {}  # 0: of its tokens; else of first tokens, by the request's size in bits
        self.memo = ResponseMemo()
        self._finishing: set[UpstreamConnection] = set()
        self._retired = False
        self._idle: list[UpstreamConnection] = []
        self._tls = tls
        check = allow.check if allow is not None else _anywhere
        self.addresses = Addresses(endpoint.host, endpoint.port, check)
        self._answered_at = ""
        self._dial_s = 0.0  # what a dial lately took, 0 while none succeeded
        self.harm: FaultInjector | None = None

    # --- health ---

    def fitness(self, now_s: float) -> float:
        """0 to 1: closed in its slow start, or half open and open to one more trial.

        One at first; each that brings content makes room for one more, so that an Endpoint that is needed at once and
        does answer is not held to the pace of its first tokens.
        """
        match current_state(self.health, now_s):
            case BreakerState.CLOSED:
                return slow_start(now_s - self.health.recovered_at_s)
            case BreakerState.HALF_OPEN:
                return SLOW_START_MIN if self.trials <= self.shown else 0.0
            case _:
                return 0.0

    def saw(self, sign: Signal, now_s: float, entropy: float) -> bool:
        """Feed the breaker; True when its state changed."""
        before = self.health
        self.health = next_health(before, sign, now_s, entropy)
        if self.health.breaker is before.breaker:
            return False
        self.shown = 0
        return True

    def slowness_of(self, size: int) -> LatencyOutlier:
        """Whether it is slower than usual: its tokens (0), or its first tokens for requests of so many bits."""
        return self.slowness.get(size) or self.slowness.setdefault(size, LatencyOutlier())

    # --- connections ---

    def take_idle(self) -> UpstreamConnection | None:
        """A warm connection, the one used last; None when a new one must be made."""
        if self.harm is not None and self.harm.strikes():
            return None
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def keep(self, connection: UpstreamConnection, now_s: float) -> None:
        """Put a clean connection aside for the next request."""
        self._finishing.discard(connection)
        if self._retired or len(self._idle) >= IDLE_CONNECTIONS_MAX or connection.transport.is_closing():
            connection.drop()
            return
        if connection.address not in self.addresses.current:  # the name has moved on, and so do we
            connection.drop()
            return
        connection.idle_since_s = now_s
        self._idle.append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection is gone."""
        self._finishing.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def watch_end(self, connection: UpstreamConnection, now_s: float) -> None:
        """Its answer is whole but for the end of its framing: keep it when that comes, drop it when it does not."""
        connection.idle_since_s = now_s
        self._finishing.add(connection)

    def retire(self) -> None:
        """No Snapshot names this Endpoint any more: keep no connection to it."""
        self._retired = True
        self.close_idle(float("inf"))

    def close_idle(self, before_s: float) -> None:
        """Close connections that have been idle since before a moment."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle[0].drop()
        for connection in [late for late in self._finishing if late.idle_since_s < before_s]:
            connection.drop()

    async def connect(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> UpstreamConnection:
        """Make a connection to one of the Endpoint's addresses, each checked against the egress rule before the dial.

        Raises: `OSError` (refused, no address), `TimeoutError`, `ssl.SSLError`, `AddressRefused`.
        """
        harmful = await self.harm.connect(self, loop, timeout_s) if self.harm is not None else None
        return harmful or await self.dial(loop, timeout_s, lambda: UpstreamConnection(self))

    async def dial(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float, make: Callable[[], UpstreamConnection]
    ) -> UpstreamConnection:
        """A connection as `make` makes it. Raises: as `connect`."""
        self.connects += 1
        began_s, limit_s = loop.time(), self._dial_max_s(timeout_s)
        addresses = await self.addresses.get(loop.time(), timeout_s)
        # The one that answered last is the first to be asked.
        addresses = sorted(addresses, key=lambda address: address != self._answered_at)
        try:
            connection = await race(
                [partial(self._dial_at, loop, address, limit_s, make) for address in addresses], UpstreamConnection.drop
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
        """After how long a dial is slow, and somebody else worth dialling beside it."""
        most_s = DIAL_SLOW_SHARE * self._dial_max_s(timeout_s)
        return min(max(RACE_AFTER_S, DIAL_SLOW_TIMES * self._dial_s), most_s) if self._dial_s else most_s

    def _dial_max_s(self, timeout_s: float) -> float:
        return timeout_s + (TLS_CONNECT_EXTRA_S if self._tls else 0.0)

    async def _dial_at(
        self, loop: asyncio.AbstractEventLoop, address: str, limit_s: float, make: Callable[[], UpstreamConnection]
    ) -> UpstreamConnection:
        async with asyncio.timeout(limit_s):
            _, connection = await loop.create_connection(
                make,
                address,
                self.endpoint.port,
                ssl=self._tls.context if self._tls else None,
                server_hostname=self.endpoint.host if self._tls else None,
            )
        connection.address = address
        return connection

    def follow_name(self, now_s: float) -> None:
        """Ask for the name's addresses when it is time, and leave those that it no longer has."""
        self.addresses.refresh(now_s)
        for connection in [idle for idle in self._idle if idle.address not in self.addresses.current]:
            connection.drop()


def _anywhere(host: str, addresses: list[str]) -> None:
    """The machine's operator wrote this Endpoint; it may be anywhere."""
