"""How connections are made: the one place where a transport meets sockets."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol, TypeVar

P = TypeVar("P", bound=asyncio.Protocol)
LATE_S = 0.1  # a timer that fires so late shows that the event loop was blocked
LATE_GRACE_S = 0.05  # what a blocked loop then has to read what came meanwhile
LATE_MAX = 10


class ClientTls(NamedTuple):
    """TLS of one connection: the trusted authorities, and the name that the certificate must have."""

    context: ssl.SSLContext
    server_name: str


@asynccontextmanager
async def peer_timeout(limit_s: float) -> AsyncIterator[None]:
    """Bound a wait for a peer, without blaming it for a blocked event loop: its answer may be here, but unread.

    Timers run before sockets are read, so `asyncio.timeout` ends such a wait although the peer was quick. Here a timer
    that fires late gives the loop another 50 ms to read, at most ten times.

    Raises: `TimeoutError`.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as limit:

        def check(due_s: float, late_left: int) -> None:
            nonlocal timer
            now_s = loop.time()
            if now_s - due_s > LATE_S and late_left:
                timer = loop.call_at(now_s + LATE_GRACE_S, check, now_s + LATE_GRACE_S, late_left - 1)
            else:
                limit.reschedule(now_s)

        due_s = loop.time() + limit_s
        timer = loop.call_at(due_s, check, due_s, LATE_MAX)
        try:
            yield
        finally:
            timer.cancel()


class Network(Protocol):
    """Makes connections."""

    async def connect(self, host: str, port: int, make_protocol: Callable[[], P], tls: ClientTls | None) -> P:
        """Connect to an address and return the protocol that the connection reports to.

        Raises: `OSError`, `ssl.SSLError`.
        """


class SocketNetwork:
    """TCP and TLS through the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    async def connect(self, host: str, port: int, make_protocol: Callable[[], P], tls: ClientTls | None) -> P:
        """Connect to an address and return the protocol that the connection reports to.

        Raises: `OSError`, `ssl.SSLError`.
        """
        _, protocol = await self._loop.create_connection(
            make_protocol,
            host,
            port,
            ssl=tls.context if tls else None,
            server_hostname=tls.server_name if tls else None,
        )
        return protocol
