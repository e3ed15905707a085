"""Addresses, the race between them, and the network that dials them."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import closing
from functools import partial

import pytest

from fleetgate.proxy.transport.dns import RESOLVE_EVERY_S, Addresses, AddressRefused, EgressRule
from fleetgate.proxy.transport.happy_eyeballs import AFTER_S, race
from fleetgate.proxy.transport.memory_network import MemoryNetwork, SimulatedLoop
from fleetgate.proxy.transport.network import SocketNetwork
from fleetgate.proxy.transport.tcp_info import CLOSE_WAIT, limit_unacknowledged, limit_unsent, read_tcp_info


def run(scene: Callable[[SimulatedLoop], Coroutine[None, None, None]]) -> None:
    with closing(SimulatedLoop()) as loop:
        loop.run_until_complete(scene(loop))


class Resolver:
    """A name server of the test's own."""

    def __init__(self, addresses: Addresses, *answer: str) -> None:
        self.answer: list[str] | Exception = list(answer)
        self.takes_s = 0.0
        self.queries = 0
        addresses.resolve = self.resolve

    async def resolve(self, host: str, port: int) -> list[str]:
        self.queries += 1
        await asyncio.sleep(self.takes_s)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def allow(host: str, addresses: list[str]) -> None:
    """Every address."""


def refuse_bad(host: str, addresses: list[str]) -> None:
    if "bad" in addresses:
        raise AddressRefused("bad")


class TestAddresses:
    """The last good answer is used until a better one comes."""

    def test_only_the_first_request_waits(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("engine.test", 80, allow)
            resolver = Resolver(addresses, "a")
            resolver.takes_s = 2.0
            both = await asyncio.gather(addresses.get(loop.time(), 5.0), addresses.get(loop.time(), 5.0))
            assert list(both) == [["a"], ["a"]] and resolver.queries == 1
            await asyncio.sleep(RESOLVE_EVERY_S)
            begin_s = loop.time()
            assert await addresses.get(begin_s, 5.0) == ["a"] and loop.time() == begin_s
            await asyncio.sleep(0)
            assert resolver.queries == 2

        run(scene)

    def test_a_slow_first_answer_is_a_timeout(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("engine.test", 80, allow)
            Resolver(addresses, "a").takes_s = 2.0
            with pytest.raises(TimeoutError):
                await addresses.get(loop.time(), 1.0)
            await asyncio.sleep(1.5)
            assert addresses.current == ["a"], "the query itself goes on"

        run(scene)

    @pytest.mark.parametrize("answer", [[], ["bad"], OSError("down"), UnicodeError("too long")])
    def test_a_bad_answer_changes_nothing(self, answer: list[str] | Exception) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("engine.test", 80, refuse_bad)
            resolver = Resolver(addresses, "a")
            await addresses.get(loop.time(), 1.0)
            resolver.answer = answer
            await asyncio.sleep(RESOLVE_EVERY_S)
            addresses.refresh(loop.time())
            await asyncio.sleep(0.1)
            assert addresses.current == ["a"] and addresses.error and resolver.queries == 2
            resolver.answer = ["b"]
            addresses.refresh(loop.time() + RESOLVE_EVERY_S)
            await asyncio.sleep(0.1)
            assert addresses.current == ["b"] and not addresses.error

        run(scene)

    @pytest.mark.parametrize("answer", [[], ["bad"], OSError("down")])
    def test_without_a_good_answer_there_is_none(self, answer: list[str] | Exception) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("engine.test", 80, refuse_bad)
            Resolver(addresses).answer = answer
            with pytest.raises((OSError, AddressRefused)):
                await addresses.get(loop.time(), 1.0)

        run(scene)

    def test_a_failed_address_is_resolved_again_after_a_second(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("engine.test", 80, allow)
            resolver = Resolver(addresses, "a")
            await addresses.get(loop.time(), 1.0)
            for wait_s, queries in ((0.5, 1), (0.6, 2), (0.5, 2)):
                await asyncio.sleep(wait_s)
                addresses.refresh(loop.time(), at_once=True)
                await asyncio.sleep(0)
                assert resolver.queries == queries

        run(scene)

    def test_a_literal_address_is_resolved_once(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            addresses = Addresses("10.0.0.1", 80, allow)
            assert await addresses.get(loop.time(), 1.0) == ["10.0.0.1"]
            resolver = Resolver(addresses)
            addresses.refresh(loop.time() + 100.0)
            await asyncio.sleep(0)
            assert not resolver.queries

        run(scene)


@pytest.mark.parametrize(
    ("ranges", "encrypted", "address", "is_allowed"),
    [
        (("10.0.0.0/8",), False, "10.1.2.3", True),
        (("10.0.0.0/8",), False, "11.1.2.3", False),
        ((), True, "8.8.8.8", True),
        ((), False, "8.8.8.8", False),
        ((), True, "10.1.2.3", False),
        (("169.254.0.0/16",), True, "169.254.169.254", False),
        (("fe80::/10",), True, "fe80::1%eth0", False),
        (("10.0.0.0/8",), False, "::ffff:10.0.0.1", True),
        ((), True, "::ffff:169.254.169.254", False),
        (("fd00::/8",), False, "fd00::1", True),
    ],
)
def test_the_egress_rule(ranges: tuple[str, ...], encrypted: bool, address: str, is_allowed: bool) -> None:
    rule = EgressRule(ranges, encrypted)
    if is_allowed:
        rule.check("engine.test", [address])
    else:
        with pytest.raises(AddressRefused, match="which --egress-allow does not include"):
            rule.check("engine.test", [address])


class TestRace:
    """While one address is silent the next is dialled."""

    def attempt(self, takes_s: float, ends: str | Exception) -> Callable[[], Coroutine[None, None, str]]:
        async def dial() -> str:
            await asyncio.sleep(takes_s)
            if isinstance(ends, Exception):
                raise ends
            return ends

        return dial

    @pytest.mark.parametrize(
        ("attempts", "winner", "takes_s"),
        [
            ([(0.1, "a")], "a", 0.1),
            ([(0.1, "a"), (0.0, "b")], "a", 0.1),
            ([(9.0, "a"), (0.1, "b")], "b", AFTER_S + 0.1),
            ([(9.0, "a"), (9.0, "b"), (0.0, "c")], "c", 2 * AFTER_S),
            ([(0.4, "a"), (0.3, "b")], "a", 0.4),
            ([(0.1, OSError("refused")), (0.1, "b")], "b", 0.2),
        ],
    )
    def test_the_first_that_answers_wins(self, attempts: list[tuple[float, str]], winner: str, takes_s: float) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            late: list[str] = []
            begin_s = loop.time()
            assert await race([self.attempt(*one) for one in attempts], late.append) == winner
            assert loop.time() - begin_s == pytest.approx(takes_s)
            await asyncio.sleep(20.0)
            assert not late and asyncio.all_tasks() == {asyncio.current_task()}

        run(scene)

    def test_two_that_answer_at_once_leave_one(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            late: list[str] = []
            attempts = [self.attempt(AFTER_S + 0.25, "a"), self.attempt(0.25, "b")]
            winner = await race(attempts, late.append)
            await asyncio.sleep(1.0)
            assert sorted([winner, *late]) in (["a", "b"], [winner])

        run(scene)

    def test_all_failures_are_the_last_one_and_a_wrong_certificate_is_told_at_once(self) -> None:
        async def scene(loop: SimulatedLoop) -> None:
            failing = [self.attempt(0.1, OSError("first")), self.attempt(0.1, OSError("last"))]
            with pytest.raises(OSError, match="last"):
                await race(failing, lambda _: None)
            wrong = [self.attempt(0.1, ssl.SSLError("wrong certificate")), self.attempt(0.0, "b")]
            with pytest.raises(ssl.SSLError):
                await race(wrong, lambda _: None)
            with pytest.raises(OSError, match="no address"):
                await race([], lambda _: None)

        run(scene)


class TestSockets:
    """What only real sockets have."""

    def test_the_socket_network_dials(self) -> None:
        async def scene() -> None:
            loop = asyncio.get_running_loop()
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
                protocol = await SocketNetwork(loop).connect("127.0.0.1", port, Made, None)
                assert protocol.transport.get_extra_info("peername") == ("127.0.0.1", port)
                protocol.transport.abort()
            with pytest.raises(ConnectionRefusedError):
                await SocketNetwork(loop).connect("127.0.0.1", port, Made, None)

        asyncio.run(scene())

    def test_the_kernel_tells_of_a_connection(self) -> None:
        async def scene() -> None:
            loop = asyncio.get_running_loop()
            with socket.create_server(("127.0.0.1", 0)) as server:
                limit_unsent(server.fileno())
                port = server.getsockname()[1]
                protocol = await SocketNetwork(loop).connect("127.0.0.1", port, Made, None)
                other, _ = await loop.run_in_executor(None, server.accept)
                limit_unacknowledged(protocol.transport)
                protocol.transport.pause_reading()
                protocol.transport.write(b"12345")
                await asyncio.sleep(0.05)
                link = read_tcp_info(protocol.transport)
                assert link is not None and link.acked_bytes == 5 + 1 and link.unacked == 0
                other.close()
                await asyncio.sleep(0.05)
                link = read_tcp_info(protocol.transport)
                assert link is None or link.state != 1
                assert CLOSE_WAIT == 8
                protocol.transport.abort()

        asyncio.run(scene())

    def test_a_connection_in_memory_has_no_kernel(self) -> None:
        with closing(SimulatedLoop()) as loop:
            made = Made()
            MemoryNetwork(loop).client(partial(Made.itself, made))
            limit_unacknowledged(made.transport)
            assert read_tcp_info(made.transport) is None


class Made(asyncio.Protocol):
    """A protocol with its transport."""

    transport: asyncio.Transport

    def itself(self) -> "Made":
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
