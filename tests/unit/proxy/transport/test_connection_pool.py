"""Which connections a pool keeps, which it closes, and how it dials."""

import asyncio
import ssl
from collections.abc import Callable, Coroutine

import pytest

from fleetgate.core.model import Endpoint
from fleetgate.protocols.http1 import ChunkedBody
from fleetgate.proxy.transport.connection_pool import (
    DIAL_SLOW_SHARE,
    IDLE_CONNECTIONS_MAX,
    TLS_CONNECT_EXTRA_S,
    ConnectionPool,
    UpstreamConnection,
)
from fleetgate.proxy.transport.dns import AddressRefused, EgressRule
from fleetgate.proxy.transport.memory_network import MemoryListener, MemoryNetwork, SimulatedLoop
from fleetgate.proxy.transport.upstream_tls import UpstreamTls


class Scene:
    """A pool for `engine.test`, whose addresses are 10.0.0.1 and more, on an in-memory network."""

    def __init__(self, addresses: int = 1, tls: UpstreamTls | None = None, rule: EgressRule | None = None) -> None:
        self.loop = SimulatedLoop()
        self.network = MemoryNetwork(self.loop)
        names = [f"10.0.0.{number}" for number in range(1, addresses + 1)]
        self.loop.names["engine.test"] = names
        self.engines: list[MemoryListener] = [self.network.listen(80, name) for name in names]
        endpoint = Endpoint(slot=0, scheme="https" if tls else "http", host="engine.test", port=80, base_path="/v1")
        self.pool = ConnectionPool(endpoint, tls, rule)

    async def connect(self, timeout_s: float = 1.0) -> UpstreamConnection:
        return await self.pool.connect(self.network, timeout_s)

    def run(self, scene: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            self.loop.run_until_complete(scene())
        finally:
            self.loop.close()


class Reader:
    """What a connection reports."""

    def __init__(self) -> None:
        self.data = b""
        self.lost: list[Exception | None] = []

    def on_data(self, data: bytes) -> None:
        self.data += data

    def on_lost(self, error: Exception | None) -> None:
        self.lost.append(error)


def test_the_connection_used_last_is_used_next() -> None:
    scene = Scene()

    async def run() -> None:
        first, second = await scene.connect(), await scene.connect()
        first.release(1.0)
        second.release(2.0)
        assert scene.pool.take_idle() is second and scene.pool.take_idle() is first and scene.pool.take_idle() is None
        assert scene.pool.connects == 2

    scene.run(run)


def test_idle_connections_are_closed_after_their_time_and_when_the_endpoint_is_gone() -> None:
    scene = Scene()

    async def run() -> None:
        old, new = await scene.connect(), await scene.connect()
        old.release(1.0)
        new.release(2.0)
        scene.pool.close_idle(1.5)
        assert old.transport.is_closing() and not new.transport.is_closing()
        busy = await scene.connect()
        scene.pool.retire()
        assert new.transport.is_closing() and not busy.transport.is_closing()
        busy.release(3.0)
        assert busy.transport.is_closing() and scene.pool.take_idle() is None

    scene.run(run)


def test_no_more_are_kept_than_the_limit() -> None:
    scene = Scene()

    async def run() -> None:
        connections = [await scene.connect() for _ in range(IDLE_CONNECTIONS_MAX + 1)]
        for connection in connections:
            connection.release(1.0)
        assert [each.transport.is_closing() for each in connections[-2:]] == [False, True]

    scene.run(run)


def test_what_the_other_end_closed_is_not_used() -> None:
    scene = Scene()

    async def run() -> None:
        connection = await scene.connect()
        connection.release(1.0)
        connection.transport.close()
        assert scene.pool.take_idle() is None
        kept = await scene.connect()
        kept.release(1.0)
        scene.engines[0].connections[-1].end()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert scene.pool.take_idle() is None

    scene.run(run)


def test_bytes_without_a_request_close_the_connection() -> None:
    scene = Scene()

    async def run() -> None:
        connection = await scene.connect()
        connection.release(1.0)
        scene.engines[0].connections[0].send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert connection.transport.is_closing() and scene.pool.take_idle() is None

    scene.run(run)


def test_a_connection_reports_data_and_its_loss_to_its_reader() -> None:
    scene = Scene()

    async def run() -> None:
        connection, reader = await scene.connect(), Reader()
        connection.carry(reader, (b"head", b"body"))
        engine = scene.engines[0].connections[0]
        assert engine.received == b"headbody" and connection.served == 1
        engine.send(b"answer")
        await asyncio.sleep(0)
        engine.reset()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert reader.data == b"answer" and isinstance(reader.lost[0], ConnectionResetError)
        dropped, silent = await scene.connect(), Reader()
        dropped.carry(silent, (b"x",))
        dropped.drop()
        await asyncio.sleep(0)
        assert not silent.lost and scene.engines[0].connections[1].is_aborted

    scene.run(run)


@pytest.mark.parametrize(
    ("rest", "is_kept"), [((b"0\r\n\r\n",), True), ((b"0\r", b"\n\r\n"), True), ((b"5\r\nhello\r\n",), False),
                          ((b"zz\r\n",), False), ((b"0\r\n\r\nHTTP/1.1",), False)],
)  # fmt: skip
def test_the_rest_of_a_framing_decides_whether_the_connection_is_kept(rest: tuple[bytes, ...], is_kept: bool) -> None:
    scene = Scene()

    async def run() -> None:
        connection = await scene.connect()
        scene.pool.drain(connection, ChunkedBody(), 1.0)
        for piece in rest:
            assert scene.pool.take_idle() is None
            connection.data_received(piece)
        assert (scene.pool.take_idle() is connection) is is_kept
        assert connection.transport.is_closing() is not is_kept

    scene.run(run)


def test_a_framing_that_does_not_end_is_not_waited_for_longer_than_an_idle_connection() -> None:
    scene = Scene()

    async def run() -> None:
        connection, lengthless = await scene.connect(), await scene.connect()
        scene.pool.drain(connection, ChunkedBody(), 1.0)
        scene.pool.drain(lengthless, None, 1.0)
        assert lengthless.transport.is_closing()
        scene.pool.close_idle(0.5)
        assert not connection.transport.is_closing()
        scene.pool.close_idle(1.5)
        assert connection.transport.is_closing()

    scene.run(run)


def test_connections_follow_the_name() -> None:
    scene = Scene()

    async def run() -> None:
        kept, busy = await scene.connect(), await scene.connect()
        kept.release(1.0)
        scene.loop.names["engine.test"] = ["10.0.0.2"]
        await asyncio.sleep(6.0)
        scene.pool.follow_name(scene.loop.time())
        await asyncio.sleep(0.1)
        scene.pool.follow_name(scene.loop.time())
        assert kept.transport.is_closing() and not busy.transport.is_closing()
        busy.release(2.0)
        assert busy.transport.is_closing()

    scene.run(run)


def test_the_address_that_answered_last_is_dialled_first() -> None:
    scene = Scene(addresses=3)

    async def run() -> None:
        scene.engines[0].is_blackhole = True
        begin_s = scene.loop.time()
        assert (await scene.connect(10.0)).address == "10.0.0.2"
        assert scene.loop.time() - begin_s == pytest.approx(0.25)
        assert (await scene.connect(10.0)).address == "10.0.0.2"
        assert [engine.dials for engine in scene.engines] == [1, 2, 0]

    scene.run(run)


def test_a_dial_ends_with_its_limit_and_its_name_is_resolved_again() -> None:
    scene = Scene()

    async def run() -> None:
        (await scene.connect()).drop()
        scene.engines[0].is_blackhole = True
        scene.loop.names["engine.test"] = ["10.0.0.9"]
        begin_s = scene.loop.time()
        with pytest.raises(TimeoutError):
            await scene.connect(2.0)
        assert scene.loop.time() - begin_s == pytest.approx(2.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert scene.pool.addresses.current == ["10.0.0.9"]

    scene.run(run)


def test_tls_gets_a_longer_limit_and_the_name_to_verify() -> None:
    scene = Scene(tls=UpstreamTls())

    async def run() -> None:
        connection = await scene.connect()
        assert isinstance(connection.transport.get_extra_info("sslcontext"), ssl.SSLContext)
        scene.engines[0].is_blackhole = True
        begin_s = scene.loop.time()
        with pytest.raises(TimeoutError):
            await scene.connect(1.0)
        assert scene.loop.time() - begin_s == pytest.approx(1.0 + TLS_CONNECT_EXTRA_S)

    scene.run(run)


def test_an_address_outside_the_rule_is_not_dialled() -> None:
    scene = Scene(rule=EgressRule(("192.0.2.0/24",), encrypted=False))

    async def run() -> None:
        with pytest.raises(AddressRefused, match=r"engine\.test resolves to 10\.0\.0\.1"):
            await scene.connect()
        assert not scene.engines[0].dials

    scene.run(run)


def test_a_dial_is_slow_by_what_dials_here_usually_take() -> None:
    scene = Scene()

    async def run() -> None:
        assert scene.pool.slow_dial_s(4.0) == DIAL_SLOW_SHARE * 4.0, "nothing is known yet"
        (await scene.connect()).drop()
        assert scene.pool.slow_dial_s(4.0) == DIAL_SLOW_SHARE * 4.0, "a dial that takes no time tells nothing"
        scene.engines[0].dial_s = 0.01
        (await scene.connect()).drop()
        assert scene.pool.slow_dial_s(4.0) == 0.25, "but not before a second address would be dialled"
        scene.engines[0].dial_s = 0.9
        for _ in range(20):
            (await scene.connect()).drop()
        assert scene.pool.slow_dial_s(4.0) == DIAL_SLOW_SHARE * 4.0
        assert scene.pool.slow_dial_s(20.0) == pytest.approx(2.7, rel=0.05)

    scene.run(run)
