"""What stands behind a name changes: its addresses, or its name server. FAULTS.md row 66."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvloop

from fleetgate.core.model import Endpoint
from fleetgate.proxy.transport import dns as addresses
from fleetgate.proxy.transport.connection_pool import ConnectionPool, UpstreamConnection
from fleetgate.proxy.transport.dns import AddressRefused, EgressRule
from fleetgate.proxy.transport.network import SocketNetwork


class Names:
    """A name server of the test's own. Shape: `answer` is a list of addresses, or what is raised."""

    def __init__(self, *answer: str) -> None:
        self.answer: list[str] | Exception = list(answer)
        self.slow_s = 0.0
        self.asked = 0

    async def resolve(self, host: str, port: int) -> list[str]:
        self.asked += 1
        await asyncio.sleep(self.slow_s)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@contextmanager
def door(host: str, port: int = 0) -> Iterator[int]:
    """Something that accepts."""
    with socket.create_server((host, port)) as server:
        yield int(server.getsockname()[1])


def peer_of(names: Names, port: int, rule: EgressRule | None = None) -> ConnectionPool:
    """An Endpoint whose name that server knows."""
    peer = ConnectionPool(Endpoint(slot=0, scheme="http", host="engine.test", port=port, base_path="/v1"), None, rule)
    peer.addresses.resolve = names.resolve
    return peer


async def dial(peer: ConnectionPool) -> UpstreamConnection:
    return await peer.connect(SocketNetwork(asyncio.get_running_loop()), 1.0)


async def turn_over(peer: ConnectionPool) -> None:
    """As the sweep does once a second, when the time has come."""
    peer.addresses._queried_s = float("-inf")
    peer.follow_name(asyncio.get_running_loop().time())
    await asyncio.sleep(0.05)
    peer.follow_name(asyncio.get_running_loop().time())


def test_row_66_a_name_that_moves_is_followed_and_its_old_address_drained() -> None:
    async def scene(port: int) -> None:
        names = Names("127.0.0.1")
        peer = peer_of(names, port)
        now_s = asyncio.get_running_loop().time()
        kept, busy = await dial(peer), await dial(peer)
        peer.keep(kept, now_s)
        names.answer = ["127.0.0.2"]
        await turn_over(peer)
        assert kept.transport.is_closing()  # idle, so it goes at once
        assert not busy.transport.is_closing()  # its answer ends first
        busy.release(now_s)
        assert busy.transport.is_closing()
        assert peer.take_idle() is None
        fresh = await dial(peer)
        assert fresh.transport.get_extra_info("peername")[0] == "127.0.0.2"
        fresh.release(now_s)
        assert peer.take_idle() is fresh
        fresh.drop()

    with door("127.0.0.1") as port, door("127.0.0.2", port):
        asyncio.run(scene(port))


@pytest.mark.parametrize(
    "answer", [[], OSError("NXDOMAIN"), UnicodeError("label too long"), ["169.254.169.254"], ["127.0.0.1", "10.0.0.1"]]
)
def test_row_66_an_empty_failing_or_poisoned_answer_changes_nothing(answer: list[str] | Exception) -> None:
    async def scene(port: int) -> None:
        names = Names("127.0.0.1")
        peer = peer_of(names, port, EgressRule(("127.0.0.0/8",), encrypted=False))
        kept = await dial(peer)
        kept.release(asyncio.get_running_loop().time())
        names.answer = answer
        await turn_over(peer)
        assert peer.addresses.current == ["127.0.0.1"]
        assert peer.addresses.error
        assert peer.take_idle() is kept
        (await dial(peer)).drop()
        kept.drop()
        names.answer = ["127.0.0.1"]
        await turn_over(peer)
        assert not peer.addresses.error

    with door("127.0.0.1") as port:
        asyncio.run(scene(port))


def test_row_66_a_name_server_that_hangs_holds_no_request_up() -> None:
    async def scene(port: int) -> None:
        names = Names("127.0.0.1")
        peer = peer_of(names, port)
        (await dial(peer)).drop()
        names.slow_s = 30.0
        peer.addresses._queried_s = float("-inf")
        begun_s = time.monotonic()
        for _ in range(20):
            (await dial(peer)).drop()
        assert time.monotonic() - begun_s < 2.0
        assert names.asked == 2  # one question is under way, and no more are asked meanwhile

    with door("127.0.0.1") as port:
        asyncio.run(scene(port))


def test_row_66_a_name_is_asked_for_every_five_seconds_and_sooner_when_it_fails() -> None:
    async def scene(port: int) -> None:
        names = Names("127.0.0.1")
        peer = peer_of(names, port)
        (await dial(peer)).drop()
        begun_s = asyncio.get_running_loop().time()
        for tenth in range(1, 200):
            peer.follow_name(begun_s + tenth / 10)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert names.asked == 1 + 3
        names.answer = ["127.0.0.3"]  # nothing listens there
        await turn_over(peer)
        asked = names.asked
        peer.addresses._queried_s = asyncio.get_running_loop().time() - 1.5
        with pytest.raises(OSError, match=r"127\.0\.0\.3"):
            await dial(peer)
        await asyncio.sleep(0.01)
        assert names.asked == asked + 1

    with door("127.0.0.1") as port:
        asyncio.run(scene(port))


def test_the_first_answer_must_be_good() -> None:
    async def scene() -> None:
        for answer, error in (([], OSError), (OSError("NXDOMAIN"), OSError), (["169.254.169.254"], AddressRefused)):
            names = Names()
            names.answer = answer
            with pytest.raises(error):
                await dial(peer_of(names, 9, EgressRule(("127.0.0.0/8",), encrypted=False)))

    asyncio.run(scene())
    assert addresses.RESOLVE_EVERY_S == 5.0


@contextmanager
def silent_door(host: str, port: int) -> Iterator[None]:
    """A queue that is full, so that the kernel answers no SYN."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex((host, port))
        time.sleep(0.1)
        yield
        for client in waiting:
            client.close()


@pytest.mark.parametrize("engine_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_row_2_an_address_that_is_silent_holds_nobody_up_where_there_is_another(
    engine_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def scene(port: int) -> None:
        peer = peer_of(Names("127.0.0.2", "127.0.0.1"), port)
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        first = await peer.connect(SocketNetwork(loop), 10.0)
        assert first.address == "127.0.0.1"
        assert 0.2 < loop.time() - begun_s < 5.0
        begun_s = loop.time()
        (await peer.connect(SocketNetwork(loop), 10.0)).drop()  # the one that answered is asked first from now on
        assert loop.time() - begun_s < 0.2
        first.drop()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with door("127.0.0.1") as port, silent_door("127.0.0.2", port), asyncio.Runner(loop_factory=engine_loop) as runner:
        runner.run(scene(port))
