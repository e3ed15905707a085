"""How connections are made: the one place where a transport meets sockets."""

import asyncio
import ssl
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

P = TypeVar("P", bound=asyncio.Protocol)


class ClientTls(NamedTuple):
    """TLS of one connection: the trusted authorities, and the name that the certificate must have."""

    context: ssl.SSLContext
    server_name: str


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
