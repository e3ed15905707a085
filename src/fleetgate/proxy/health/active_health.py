"""Probes Endpoints: one worker does it for all and writes the results to shared memory.

Health and load are read with GET. Only the resume probe sends generation requests of its own.
"""

import asyncio
import ssl
from collections.abc import Callable

from fleetgate.core.health.circuit_breaker import Signal
from fleetgate.core.model import Deployment
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory
from fleetgate.protocols import engines, http1
from fleetgate.protocols.http1 import ChunkedBody, Malformed, ResponseHead
from fleetgate.proxy.health.passive_health import PassiveHealthChecker
from fleetgate.proxy.routing.active_table import ActiveTable
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.connection_pool import UpstreamConnection
from fleetgate.proxy.transport.dns import AddressRefused
from fleetgate.proxy.transport.network import Network, peer_timeout

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
RESPONSE_BYTES_MAX = 1024 * 1024
UNKNOWN = -1


class ProbeResponse:
    """Reads one response on its own connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.result: asyncio.Future[tuple[ResponseHead, bytes]] = loop.create_future()
        self._buffer = b""

    def on_data(self, data: bytes) -> None:
        """Bytes came."""
        self._buffer += data
        try:
            self._parse(ended=False)
        except Malformed as error:
            self._fail(error)
        if len(self._buffer) > RESPONSE_BYTES_MAX:
            self._fail(Malformed(502, "the response to a probe is over 1 MiB"))

    def on_lost(self, error: Exception | None) -> None:
        """The connection ended."""
        try:
            self._parse(ended=True)
        except Malformed as malformed:
            self._fail(malformed)
        self._fail(ConnectionResetError("the connection was closed"))

    def _fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)

    def _parse(self, ended: bool) -> None:
        head_bytes, mark, rest = self._buffer.partition(http1.HEAD_END)
        if not mark or self.result.done():
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
            self.result.set_result((head, body))


class HealthChecker:
    """Probes every Endpoint once a second while this worker holds the prober's lock; all workers read the results.

    Shape: `try_lock` takes the lock if no other worker holds it; `is_prober` says whether this worker holds it.
    """

    def __init__(
        self,
        active: ActiveTable,
        shared: SharedMemory,
        passive: PassiveHealthChecker,
        network: Network,
        try_lock: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._active = active
        self._shared = shared
        self._passive = passive
        self._network = network
        self._try_lock = try_lock
        self._clock = clock
        self.is_prober = False
        self._external: dict[int, int] = {}  # by Endpoint slot, at the last poll
        self._running: dict[EndpointState, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Probe, and apply the results of probes, until cancelled."""
        while True:
            self.is_prober = self.is_prober or self._try_lock()
            if self.is_prober:
                self._start_probes()
            await asyncio.sleep(PROBE_EVERY_S / 4)
            self._apply_results()

    def retire(self) -> None:
        """Stop probing: this worker stops."""
        self.is_prober = False

    def _start_probes(self) -> None:
        table, now_ms = self._active.current, int(self._clock() * 1000)
        for deployment in table.deployments.values():
            for endpoint in deployment.endpoints:
                seen_ms = self._shared.signal(endpoint.spec.slot, EndpointSignal.SEEN_MS)
                running = self._running.get(endpoint)
                if (running is None or running.done()) and now_ms - seen_ms >= PROBE_EVERY_S * 1000:
                    self._running[endpoint] = asyncio.ensure_future(self._probe(deployment.spec, endpoint))
        known = table.endpoints.values()
        self._running = {
            endpoint: task for endpoint, task in self._running.items() if not task.done() or endpoint in known
        }

    def _apply_results(self) -> None:
        """Feed the prober's results to this worker's circuit breakers."""
        for endpoint in self._active.current.endpoints.values():
            if endpoint.note_probe(self._shared.signal(endpoint.spec.slot, EndpointSignal.SEEN_MS)):
                is_up = self._shared.signal(endpoint.spec.slot, EndpointSignal.UP)
                self._passive.record(endpoint, Signal.PROBE_WELL if is_up else Signal.PROBE_BROKE)

    async def _probe(self, deployment: Deployment, endpoint: EndpointState) -> None:
        engine = engines.find(deployment.engine)
        health_path = deployment.health_path or (engine.HEALTH_PATH if engine is not None else "")
        started_s = self._clock()
        up, rtt_us = 1, 0
        try:
            async with peer_timeout(PROBE_TIMEOUT_S):
                connection = await endpoint.pool.connect(self._network, PROBE_TIMEOUT_S)
                rtt_us = int((self._clock() - started_s) * 1e6)
                try:
                    if health_path:
                        head, _ = await self._get(connection, endpoint, health_path)
                        up = int(head.status < 400 or head.status in (401, 403, 404))
                finally:
                    connection.drop()
                if up and engine is not None and engine.METRICS_PATH:
                    await self._read_load(engine.read, engine.METRICS_PATH, deployment, endpoint)
        except (OSError, TimeoutError, ssl.SSLError, AddressRefused, Malformed):
            up = 0
        self._publish(endpoint.spec.slot, up, rtt_us)

    async def _get(
        self, connection: UpstreamConnection, endpoint: EndpointState, path: str
    ) -> tuple[ResponseHead, bytes]:
        response = ProbeResponse(asyncio.get_running_loop())
        host, port = endpoint.spec.host, endpoint.spec.port
        head = f"GET {path} HTTP/1.1\r\nhost: {host}:{port}\r\nuser-agent: fleetgate-probe\r\n"
        connection.carry(response, ((head + "accept-encoding: identity\r\nconnection: close\r\n\r\n").encode(),))
        return await response.result

    async def _read_load(
        self,
        read: Callable[[bytes], engines.EngineSignals],
        path: str,
        deployment: Deployment,
        endpoint: EndpointState,
    ) -> None:
        """Read the engine's metrics. An engine without them stays healthy and is routed by this machine's counts."""
        shared, slot = self._shared, endpoint.spec.slot
        own_before = shared.in_flight_total(deployment.slot)
        connection = await endpoint.pool.connect(self._network, PROBE_TIMEOUT_S)
        try:
            head, body = await self._get(connection, endpoint, path)
        except (OSError, Malformed):
            return
        finally:
            connection.drop()
        if head.status != 200:
            return
        signals = read(body)
        shared.set_signal(slot, EndpointSignal.RUNNING, UNKNOWN if signals.running is None else signals.running)
        shared.set_signal(slot, EndpointSignal.WAITING, UNKNOWN if signals.waiting is None else signals.waiting)
        kv_permille = UNKNOWN if signals.kv_ratio is None else int(signals.kv_ratio * 1000)
        shared.set_signal(slot, EndpointSignal.KV_PERMILLE, kv_permille)
        # Requests from elsewhere at the same engine. This machine's requests are the larger count of before and after:
        # a request that has just ended is not external.
        own = max(own_before, shared.in_flight_total(deployment.slot))
        running = (signals.running or 0) + (signals.waiting or 0)
        external = max(0, running - own) if len(deployment.endpoints) == 1 else 0
        # The lower of two polls: an engine still counts a request shortly after its last byte has come.
        shared.set_signal(slot, EndpointSignal.FOREIGN, min(external, self._external.get(slot, 0)))
        self._external[slot] = external
        shared.set_signal(slot, EndpointSignal.LOAD_SEEN_MS, int(self._clock() * 1000))

    def _publish(self, slot: int, up: int, rtt_us: int) -> None:
        self._shared.set_signal(slot, EndpointSignal.UP, up)
        if rtt_us:
            self._shared.set_signal(slot, EndpointSignal.RTT_US, rtt_us)
        self._shared.set_signal(slot, EndpointSignal.SEEN_MS, int(self._clock() * 1000))
