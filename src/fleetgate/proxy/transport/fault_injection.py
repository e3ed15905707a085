"""Injected faults: connections that treat a request as a faulty Endpoint would.

Nothing here runs while no fault is in force.
"""

import asyncio
import random
from collections.abc import Callable

from fleetgate.core.fault_injection import Fault, FaultKind, select_fault
from fleetgate.protocols.http1 import HEAD_END, status_line
from fleetgate.proxy.transport.connection_pool import ConnectionPool, FaultInjector, ResponseReader, UpstreamConnection
from fleetgate.proxy.transport.network import Network

CUT_BYTES_MAX = 2_000  # about ten events of a stream
_BODY = b'{"error":{"message":"a fault was injected here","type":"server_error","param":null,"code":null}}'


class ActiveFaults(FaultInjector):
    """The faults on one Endpoint. Shape: `on_strike` is called for each request that gets one."""

    def __init__(self, faults: tuple[Fault, ...], on_strike: Callable[[Fault], None]) -> None:
        self.faults = faults
        self._on_strike = on_strike
        self._pending: list[Fault] = []
        self._random = random.Random()
        # Health probes only call `connect`; they are refused only if all requests are.
        self._refuse_all = next((one for one in faults if one.kind is FaultKind.REFUSE and one.share >= 1.0), None)

    def strikes(self) -> bool:
        """Whether the next request gets a fault, which its `connect` then applies."""
        fault = select_fault(self.faults, self._random.random())
        if fault is not None:
            self._on_strike(fault)
            self._pending.append(fault)
        return fault is not None

    async def connect(self, pool: ConnectionPool, network: Network, timeout_s: float) -> UpstreamConnection | None:
        """The connection for a request with a fault; None for a request without.

        Raises: `ConnectionRefusedError` and what `ConnectionPool.connect` raises.
        """
        fault = self._pending.pop() if self._pending else self._refuse_all
        if fault is None:
            return None
        if fault.kind is FaultKind.REFUSE:
            raise ConnectionRefusedError("an injected fault refuses the connection")
        if fault.kind is FaultKind.DELAY:
            await asyncio.sleep(fault.delay_s)
            return None
        left_bytes = self._random.randrange(CUT_BYTES_MAX)
        return await pool.dial(network, timeout_s, lambda: FaultyConnection(pool, fault, left_bytes))


class FaultyConnection(UpstreamConnection):
    """A connection that returns an error or only the beginning of a response. It is never used twice."""

    __slots__ = ("_fault", "_has_begun", "_left_bytes")

    def __init__(self, pool: ConnectionPool, fault: Fault, left_bytes: int) -> None:
        super().__init__(pool)
        self._fault = fault
        self._left_bytes = left_bytes
        self._has_begun = False

    def carry(self, reader: ResponseReader, request: tuple[bytes, ...]) -> None:
        """Send the request, unless this object makes the response."""
        if self._fault.kind is not FaultKind.ERROR:
            super().carry(reader, request)
            return
        self.reader = reader
        self.served += 1
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(_BODY)
        response = status_line(self._fault.status) + head + _BODY
        asyncio.get_running_loop().call_soon(super().data_received, response)

    def data_received(self, data: bytes) -> None:
        """Pass on the bytes before the fault."""
        if not self._has_begun:
            self._has_begun = True
            self._left_bytes += data.find(HEAD_END) + 4 if HEAD_END in data else 0
            if b"content-length" in data.lower():
                self._left_bytes = min(self._left_bytes, len(data) - 1)  # a short body would otherwise be whole
        passed, self._left_bytes = data[: self._left_bytes], max(0, self._left_bytes - len(data))
        if passed:
            super().data_received(passed)
        if len(passed) < len(data) and self._fault.kind is FaultKind.CUT:
            reader, self.reader = self.reader, None
            self.transport.abort()
            if reader is not None:
                reader.on_lost(ConnectionResetError("an injected fault cut the response"))

    def release(self, now_s: float) -> None:
        """Close: it must not carry another request."""
        self.drop()
