"""Injected faults at the upstream seam: connections that do to their attempt what a sick Endpoint would do.

Nothing here runs while no fault is in force.
"""

import asyncio
import random
from collections.abc import Callable

from fleetgate.core.fault_injection import Fault, FaultKind, select_fault
from fleetgate.protocols.http1 import HEAD_END, status_line
from fleetgate.proxy.transport.connection_pool import EndpointState, FaultInjector, ResponseReader, UpstreamConnection

CUT_BYTES_MAX = 2_000  # some ten events into a stream
_BODY = b'{"error":{"message":"a fault was injected here","type":"server_error","param":null,"code":null}}'


class ActiveFaults(FaultInjector):
    """The faults on one Endpoint. Shape: `on_strike` counts, by Deployment and kind."""

    def __init__(self, faults: tuple[Fault, ...], on_strike: Callable[[Fault], None]) -> None:
        self.faults = faults
        self._on_strike = on_strike
        self._owed: list[Fault] = []
        self._random = random.Random()
        # Probes come over `connect` alone, and meet a closed door only where everybody does.
        self._closed = next((one for one in faults if one.kind is FaultKind.REFUSE and one.share >= 1.0), None)

    def strikes(self) -> bool:
        """Whether the request that asks for a connection is struck; `connect` then is its blow."""
        fault = select_fault(self.faults, self._random.random())
        if fault is not None:
            self._on_strike(fault)
            self._owed.append(fault)
        return fault is not None

    async def connect(
        self, peer: EndpointState, loop: asyncio.AbstractEventLoop, timeout_s: float
    ) -> UpstreamConnection | None:
        """The connection for a struck request; None when this one was not struck.

        Raises: `ConnectionRefusedError` and what `EndpointState.connect` raises.
        """
        fault = self._owed.pop() if self._owed else self._closed
        if fault is None:
            return None
        if fault.kind is FaultKind.REFUSE:
            raise ConnectionRefusedError("an injected fault refuses the connection")
        if fault.kind is FaultKind.DELAY:
            await asyncio.sleep(fault.delay_s)
            return None
        left = self._random.randrange(CUT_BYTES_MAX)
        return await peer.dial(loop, timeout_s, lambda: FaultyConnection(peer, fault, left))


class FaultyConnection(UpstreamConnection):
    """A connection that answers with an error, or whose answer ends too early. Never used twice."""

    __slots__ = ("_begun", "_fault", "_left")

    def __init__(self, peer: EndpointState, fault: Fault, left: int) -> None:
        super().__init__(peer)
        self._fault = fault
        self._left = left
        self._begun = False

    def carry(self, attempt: ResponseReader, request: tuple[bytes, ...]) -> None:
        """Send the request, unless the answer is made here."""
        if self._fault.kind is not FaultKind.ERROR:
            super().carry(attempt, request)
            return
        self.attempt = attempt
        self.served += 1
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(_BODY)
        answer = status_line(self._fault.status) + head + _BODY
        asyncio.get_running_loop().call_soon(super().data_received, answer)

    def data_received(self, data: bytes) -> None:
        """Pass on what comes before the fault."""
        if not self._begun:
            self._begun = True
            self._left += data.find(HEAD_END) + 4 if HEAD_END in data else 0
            if b"content-length" in data.lower():
                self._left = min(self._left, len(data) - 1)  # a short answer, which would else be whole
        passed, self._left = data[: self._left], max(0, self._left - len(data))
        if passed:
            super().data_received(passed)
        if len(passed) < len(data) and self._fault.kind is FaultKind.CUT:
            attempt, self.attempt = self.attempt, None
            self.transport.abort()
            if attempt is not None:
                attempt.on_lost(ConnectionResetError("an injected fault cut the answer"))

    def release(self, now_s: float) -> None:
        """Never again."""
        self.drop()
