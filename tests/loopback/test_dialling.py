"""A port that takes SYNs and answers none: somebody else is dialled beside it, and one engine gets the request."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest

from fleetgate.core.exchange import Failure
from fleetgate.core.model import Resilience
from tests.loopback.wall import Wall
from tests.loopback.wall_client import request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

LIMIT_S = 4.0
PATIENCE = {"fleetgate.proxy.transport.connection_pool.ConnectionPool.slow_dial_s": "lambda peer, timeout_s: 0.3"}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2, patience=PATIENCE) as made:
        yield made


@contextmanager
def deaf() -> Iterator[socket.socket]:
    """A listener whose queue is full: Linux then lets SYNs fall, and who dials tries again after a second."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener


def use(made: Plane, *ports: int) -> None:
    """Deployments `one` and `two` at these ports, in this order of rank."""
    at = [
        msgspec.structs.replace(one, endpoints=(msgspec.structs.replace(one.endpoints[0], port=port),))
        for one, port in zip(made.deployments({}, {}), ports, strict=True)
    ]
    made.publish(at, resilience=Resilience(connect_timeout_s=LIMIT_S))


@pytest.mark.parametrize("stream", [True, False])
def test_row_2_who_is_dialled_beside_a_deaf_one_answers(two: Plane, stream: bool) -> None:
    with deaf() as listener:
        use(two, listener.getsockname()[1], two.walls[1].port)
        began_s = time.monotonic()
        answer = two.ask(request("m", stream=stream))
        took_s = time.monotonic() - began_s
        assert (answer.status, answer.headers["x-fleetgate-deployment"]) == (200, "two") and answer.whole
        assert 0.3 <= took_s < LIMIT_S / 2
        two.wait_idle()
        assert len(two.walls[1].seen) == 1
        # That nobody can be reached there is known although nobody waited for it.
        wait_for(lambda: failures(two, Failure.UNREACHABLE) == 1)


def failures(made: Plane, failure: Failure) -> int:
    """Of Deployment `one`, since its fresh slot was used."""
    totals = made.rig.board.series_totals()
    return sum(count for name, count in totals.items() if f'failure="{failure}"' in name)


def test_row_2_whoever_is_connected_first_gets_the_request_alone(two: Plane) -> None:
    """Both are deaf; the first one wakes up in time for the second SYN."""
    with deaf() as first, deaf() as second, two.client() as client:
        use(two, first.getsockname()[1], second.getsockname()[1])
        client.send(request("m"))
        time.sleep(0.6)
        with Wall(listen=lambda _: first) as woken:
            answer = client.read()
            assert (answer.status, answer.headers["x-fleetgate-deployment"]) == (200, "one")
            assert len(woken.seen) == 1
            wait_for(lambda: two.in_flight() == 0)
            assert two.ask(request("m")).headers["x-fleetgate-deployment"] == "one"


def test_a_client_that_leaves_while_two_are_dialled_leaves_nothing(two: Plane) -> None:
    with deaf() as first, deaf() as second:
        use(two, first.getsockname()[1], second.getsockname()[1])
        with two.client() as client:
            client.send(request("m"))
            wait_for(lambda: two.in_flight() == 2)
        wait_for(lambda: two.in_flight() == 0)
