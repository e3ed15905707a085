"""A second attempt beside a slow one, on real sockets: the quicker answers, the other is cancelled."""

import time
from collections.abc import Iterator

import pytest

from fleetgate.core.health.hedge_policy import SEEN_MIN
from fleetgate.core.model import Resilience
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_replies import stream_of
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

LONG_S = 6.0


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2) as made:
        yield made


def use(made: Plane, second: str = "ok", hedge: str = "all") -> None:
    """The first engine is as slow as it is asked to be; what is usual has been seen."""
    engines = ("slow", second)
    made.use(*({"models": {"m": name}, "concurrency_max": 10} for name in engines), resilience=Resilience(hedge=hedge))
    for _ in range(SEEN_MIN):
        assert ask(made, 0.0).whole
    for wall in made.walls:
        wall.forget()


def ask(made: Plane, delay_s: float, stream: bool = True) -> Answer:
    return made.ask(request("m", stream=stream, wall={"delay_s": delay_s}))


@pytest.mark.parametrize("stream", [True, False])
def test_the_second_is_quicker_and_the_first_is_cancelled(two: Plane, stream: bool) -> None:
    use(two)
    began_s = time.monotonic()
    answer = ask(two, LONG_S, stream)
    assert time.monotonic() - began_s < LONG_S
    assert answer.status == 200 and answer.whole
    assert answer.headers["x-fleetgate-deployment"] == "two" and answer.headers["x-fleetgate-attempts"] == "2"
    wait_for(lambda: two.walls[0].seen[0].gone_s > 0.0)
    two.wait_idle()


def test_the_first_is_quicker_and_the_second_is_cancelled(two: Plane) -> None:
    use(two, second="silent")
    answer = ask(two, 1.5)
    assert answer.headers["x-fleetgate-deployment"] == "one" and answer.body == b"".join(stream_of("m"))
    assert len(two.walls[1].seen) == 1
    wait_for(lambda: two.walls[1].seen[0].gone_s > 0.0)
    two.wait_idle()


def test_the_second_fails_and_the_first_goes_on(two: Plane) -> None:
    use(two, second="500")
    answer = ask(two, 1.5)
    assert answer.headers["x-fleetgate-deployment"] == "one" and answer.whole
    assert len(two.walls[1].seen) == 1
    two.wait_idle()


def test_a_client_that_leaves_frees_both(two: Plane) -> None:
    use(two, second="silent")
    with two.client() as client:
        client.send(request("m", stream=True, wall={"delay_s": LONG_S}))
        wait_for(lambda: len(two.walls[1].seen) == 1)
    wait_for(lambda: all(wall.seen[0].gone_s > 0.0 for wall in two.walls))
    two.wait_idle()


@pytest.mark.parametrize("hedge", ["off", "critical"])
def test_others_wait(two: Plane, hedge: str) -> None:
    use(two, hedge=hedge)
    answer = ask(two, 1.5)
    assert answer.headers["x-fleetgate-deployment"] == "one" and not two.walls[1].seen


def test_a_fleet_that_is_busy_hedges_nobody(two: Plane) -> None:
    use(two, second="slow")
    clients = [two.client() for _ in range(13)]  # of 20 places
    for client in clients:
        client.send(request("m", stream=True, wall={"delay_s": 1.5}))
    answers = [client.read() for client in clients]
    for client in clients:
        client.socket.close()
    assert all(answer.whole and answer.headers["x-fleetgate-attempts"] == "1" for answer in answers)
    two.wait_idle()
