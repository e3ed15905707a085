"""The transport on asyncio streams of bytes: each connection is an `asyncio.Protocol`, each response a relay."""

import asyncio
import ssl

from fleetgate.core.exchange import Failure
from fleetgate.proxy.transport.connection_pool import ConnectionPool
from fleetgate.proxy.transport.dns import AddressRefused
from fleetgate.proxy.transport.interface import ExpectedResponse, ResponseListener, Spawn
from fleetgate.proxy.transport.network import Network
from fleetgate.proxy.transport.response_relay import ResponseRelay
from fleetgate.proxy.transport.resume_relay import ResumeRelay

NAME = "asyncio"


class AsyncioTransport:
    """Sends requests on kept connections, or on new ones."""

    __slots__ = ("_network", "_spawn")

    def __init__(self, network: Network, spawn: Spawn) -> None:
        self._network = network
        self._spawn = spawn

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
        """Send a request on a kept connection, or on a new one if none is kept or it must be `fresh`."""
        relay = ResponseRelay if expected.resumed is None else ResumeRelay
        response = relay(listener, expected)
        connection = None if fresh else pool.take_idle()
        if connection is None:
            self._spawn(self._dial(pool, request, response, listener, connect_timeout_s))
        else:
            response.connection = connection
            response.is_connected = True
            connection.carry(response, request)
        return response

    async def _dial(
        self,
        pool: ConnectionPool,
        request: tuple[bytes, ...],
        response: ResponseRelay,
        listener: ResponseListener,
        timeout_s: float,
    ) -> None:
        """Make a connection and send the request on it."""
        failure = None
        slow = asyncio.get_running_loop().call_later(pool.slow_dial_s(timeout_s), listener.on_dial_slow, response)
        try:
            connection = await pool.connect(self._network, timeout_s)
        except ssl.SSLError as error:
            failure, reason = Failure.TLS, f"TLS: {error.reason or error}"
        except (OSError, TimeoutError, AddressRefused) as error:
            failure, reason = Failure.UNREACHABLE, str(error) or "connect timed out"
        finally:
            slow.cancel()
        if failure is not None:
            listener.on_not_connected(response, failure, reason)
            response.cancel()
        elif response.over:  # another attempt was quicker, the client left, or the deadline passed
            pool.keep(connection, listener.now_s())
        else:
            response.connection = connection
            response.is_connected = True
            listener.on_connected(response)
            if not response.over:
                connection.carry(response, request)
                if response.paused:
                    connection.transport.pause_reading()


def make(network: Network, spawn: Spawn) -> AsyncioTransport:
    """A transport that dials through `network` and runs its coroutines with `spawn`."""
    return AsyncioTransport(network, spawn)
