"""Asks Endpoints how they are: one worker does it for all and writes what it learns on the board.

Readiness and load are read with GET; the one generation request that no client asked for is `prefill.py`'s.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

from fleetgate.core.health.circuit_breaker import Signal
from fleetgate.core.model import Deployment
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory
from fleetgate.protocols import engines, http1
from fleetgate.protocols.http1 import ChunkedBody, Malformed, ResponseHead
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.connection_pool import UpstreamConnection
from fleetgate.proxy.transport.dns import AddressRefused

if TYPE_CHECKING:
    from fleetgate.proxy.worker.services import Hub

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
ANSWER_BYTES_MAX = 1024 * 1024
UNKNOWN = -1


class ProbeResponse:
    """One answer on a connection of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[tuple[ResponseHead, bytes]] = loop.create_future()
        self._buffer = b""

    def on_data(self, data: bytes) -> None:
        """Bytes came."""
        self._buffer += data
        try:
            self._try(ended=False)
        except Malformed as error:
            self._fail(error)
        if len(self._buffer) > ANSWER_BYTES_MAX:
            self._fail(Malformed(502, "the answer to a probe is too long"))

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended."""
        try:
            self._try(ended=True)
        except Malformed as malformed:
            self._fail(malformed)
        self._fail(ConnectionResetError("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def _try(self, ended: bool) -> None:
        head_bytes, mark, rest = self._buffer.partition(http1.HEAD_END)
        if not mark or self.answer.done():
            return
        head = http1.parse_response_head(head_bytes + mark)
        if head.chunked:
            chunks = ChunkedBody()
            body = chunks.feed(rest)
            whole = chunks.done
        elif head.content_length >= 0:
            body, whole = rest[: head.content_length], len(rest) >= head.content_length
        else:
            body, whole = rest, ended
        if whole:
            self.answer.set_result((head, body))


class HealthChecker:
    """Probes every Endpoint once a second while this worker holds the prober's lock; all workers read the signs."""

    def __init__(self, hub: "Hub", become_prober: Callable[[], bool]) -> None:
        self._hub = hub
        self._become_prober = become_prober
        self.mine = False
        self._foreign: dict[int, int] = {}  # by Endpoint slot, as the last poll had it
        self._running: dict[EndpointState, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Probe, and follow what was probed, until cancelled."""
        while True:
            self.mine = self.mine or self._become_prober()
            if self.mine:
                self._start_probes()
            await asyncio.sleep(PROBE_EVERY_S / 4)
            self._follow()

    def _start_probes(self) -> None:
        hub, now_ms = self._hub, int(self._hub.clock() * 1000)
        for place in hub.tables.places.values():
            for peer in place.peers:
                seen_ms = hub.board.signal(peer.endpoint.slot, EndpointSignal.SEEN_MS)
                running = self._running.get(peer)
                if (running is None or running.done()) and now_ms - seen_ms >= PROBE_EVERY_S * 1000:
                    self._running[peer] = hub.loop.create_task(self._probe(place.deployment, peer))
        known = hub.tables.peers.values()
        self._running = {peer: task for peer, task in self._running.items() if not task.done() or peer in known}

    def _follow(self) -> None:
        """Feed what the prober saw to this worker's breakers."""
        hub = self._hub
        for peer in hub.tables.peers.values():
            seen_ms = hub.board.signal(peer.endpoint.slot, EndpointSignal.SEEN_MS)
            if seen_ms > peer.probe_seen_ms:
                peer.probe_seen_ms = seen_ms
                up = hub.board.signal(peer.endpoint.slot, EndpointSignal.UP)
                hub.ward.saw(peer, Signal.PROBE_WELL if up else Signal.PROBE_BROKE)

    async def _probe(self, deployment: Deployment, peer: EndpointState) -> None:
        hub = self._hub
        engine = engines.find(deployment.engine)
        health_path = deployment.health_path or (engine.HEALTH_PATH if engine is not None else "")
        begun_s = hub.clock()
        up, rtt_us = 1, 0
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                connection = await peer.pool.connect(hub.network, PROBE_TIMEOUT_S)
                rtt_us = int((hub.clock() - begun_s) * 1e6)
                try:
                    if health_path:
                        head, _ = await self._get(connection, peer, health_path)
                        up = int(head.status < 400 or head.status in (401, 403, 404))
                finally:
                    connection.drop()
                if up and engine is not None and engine.METRICS_PATH:
                    await self._read_load(engine.read, engine.METRICS_PATH, deployment, peer)
        except (OSError, TimeoutError, ssl.SSLError, AddressRefused, Malformed):
            up = 0
        self._write(hub.board, peer.endpoint.slot, up, rtt_us)

    async def _get(self, connection: UpstreamConnection, peer: EndpointState, path: str) -> tuple[ResponseHead, bytes]:
        get = ProbeResponse(self._hub.loop)
        host = peer.endpoint.host
        head = f"GET {path} HTTP/1.1\r\nhost: {host}:{peer.endpoint.port}\r\nuser-agent: fleetgate-probe\r\n"
        connection.carry(get, ((head + "accept-encoding: identity\r\nconnection: close\r\n\r\n").encode(),))
        return await get.answer

    async def _read_load(
        self, read: Callable[[bytes], engines.EngineSignals], path: str, deployment: Deployment, peer: EndpointState
    ) -> None:
        """Load is optional: an engine without metrics is routed by our own counts, and stays up."""
        hub, slot = self._hub, peer.endpoint.slot
        ours_before = hub.board.in_flight_total(deployment.slot)
        connection = await peer.pool.connect(hub.network, PROBE_TIMEOUT_S)
        try:
            head, body = await self._get(connection, peer, path)
        except (OSError, Malformed):
            return
        finally:
            connection.drop()
        if head.status != 200:
            return
        signals = read(body)
        board = hub.board
        board.set_signal(slot, EndpointSignal.RUNNING, UNKNOWN if signals.running is None else signals.running)
        board.set_signal(slot, EndpointSignal.WAITING, UNKNOWN if signals.waiting is None else signals.waiting)
        kv = UNKNOWN if signals.kv_ratio is None else int(signals.kv_ratio * 1000)
        board.set_signal(slot, EndpointSignal.KV_PERMILLE, kv)
        # What others send to the same engine; ours before and after, so that a request that just ended is not foreign.
        ours = max(ours_before, board.in_flight_total(deployment.slot))
        there = (signals.running or 0) + (signals.waiting or 0)
        foreign = max(0, there - ours) if len(deployment.endpoints) == 1 else 0
        # Seen twice: an engine goes on counting a request of ours for a moment after we have its last byte.
        board.set_signal(slot, EndpointSignal.FOREIGN, min(foreign, self._foreign.get(slot, 0)))
        self._foreign[slot] = foreign
        board.set_signal(slot, EndpointSignal.LOAD_SEEN_MS, int(hub.clock() * 1000))

    def _write(self, board: SharedMemory, slot: int, up: int, rtt_us: int) -> None:
        board.set_signal(slot, EndpointSignal.UP, up)
        if rtt_us:
            board.set_signal(slot, EndpointSignal.RTT_US, rtt_us)
        board.set_signal(slot, EndpointSignal.SEEN_MS, int(self._hub.clock() * 1000))
