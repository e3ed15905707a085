"""Engines that ask to be left alone, that fail now and then, and regions that fall as a whole."""

from collections.abc import Iterator

import pytest

from fleetgate.core.model import Slo
from fleetgate.ipc.event_spool import EventSpool
from tests.loopback.rig import deployment
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import request
from tests.loopback.wall_replies import REPLIES
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

BODY = b'{"error":{"message":"slow down"}}'


async def asks_for_a_minute(line: Line, seen: Seen) -> None:
    """429 with Retry-After."""
    line.end()
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 60\r\n"
    line.write(head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)


@pytest.fixture(scope="module")
def three() -> Iterator[Plane]:
    with plane(walls=3) as made:
        for wall in made.walls:
            wall.replies["asks-for-a-minute"] = asks_for_a_minute
        yield made


def use(made: Plane, *engines: str, **options: object) -> None:
    made.use(*({"models": {"m": name}, "region": "r"} for name in engines), **options)


def test_row_16_an_engine_that_asks_to_be_left_alone_is(three: Plane) -> None:
    use(three, "asks-for-a-minute", "ok")
    for _ in range(8):
        assert three.ask(request("m")).status == 200
    assert len(three.walls[0].seen) == 1, "it was asked once, and not again before its time"


@pytest.mark.parametrize("options", [{}, {"slo": Slo()}], ids=["without slo", "with slo"])
def test_when_all_ask_for_it_the_client_hears_for_how_long(three: Plane, options: dict[str, object]) -> None:
    use(three, "asks-for-a-minute", "asks-for-a-minute", **options)
    answers = [three.ask(request("m")) for _ in range(4)]
    assert [answer.status for answer in answers] == [429] * 4
    assert all(50 <= int(answer.headers["retry-after"]) <= 60 for answer in answers)
    assert [len(wall.seen) for wall in three.walls[:2]] == [1, 1]
    three.wait_idle()


def test_deployments_that_fall_together_take_their_region_with_them(three: Plane) -> None:
    """The third of the region gets one request at a time, until one went well; another region takes the rest."""
    third = three.walls[2]
    third.replies["third"] = REPLIES["ok"]
    made = three.deployments(*({"models": {"m": name}, "region": "r"} for name in ("500", "500", "third")))
    elsewhere = deployment("elsewhere", third.port, made[-1].slot + 1000, models={"m": "ok"}, region="s")
    three.publish([*made, elsewhere])
    spool = EventSpool(three.rig.data_dir)
    spool.take()
    told: list[str] = []

    def is_told() -> bool:
        assert three.ask(request("m")).status == 200
        told.extend(happened.message for happened in spool.take())
        return any("region r is treated as lost" in sentence for sentence in told)

    wait_for(is_told)
    lost = next(sentence for sentence in told if "region r is treated as lost" in sentence)
    assert "one at http" in lost and "two at http" in lost and "three" not in lost
    third.replies["third"] = REPLIES["held"]
    third.hold()
    third.forget()
    clients = [three.client() for _ in range(6)]
    for client in clients:
        client.send(request("m"))
    wait_for(lambda: len(third.seen) >= 6)
    assert [seen.model for seen in third.seen].count("third") == 1
    third.release()
    for client in clients:
        assert client.read().status == 200
        client.socket.close()
    third.replies["third"] = REPLIES["ok"]
    wait_for(lambda: three.ask(request("m")).headers["x-fleetgate-deployment"] == "three")
    three.wait_idle()


def test_deployments_that_fall_together_do_not_take_the_only_region_with_them(three: Plane) -> None:
    """There is nobody to take the load of the third, so it is not held back for the sake of its neighbours."""
    use(three, "500", "500", "ok", strategy="capacity_round_robin")
    spool = EventSpool(three.rig.data_dir)
    spool.take()
    told: list[str] = []

    def are_out() -> bool:
        assert three.ask(request("m")).status == 200
        told.extend(happened.message for happened in spool.take())
        return sum(" ejected for " in sentence for sentence in told) == 2

    wait_for(are_out)
    assert not any("taken for lost" in sentence for sentence in told)
