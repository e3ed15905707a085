"""A region whose packets are lost: no refusal and no reset, only silence. Needs root, for networks of its own."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import msgspec
import pytest

from fleetgate.core.health.circuit_breaker import EJECTION_FIRST_S, JITTER
from fleetgate.proxy.transport.connection_pool import DIAL_SLOW_SHARE
from fleetgate.proxy.transport.tcp_info import UNHEARD_MS_MAX
from tests.faults.far_region import FarRegion, why_not
from tests.loopback.test_resume import PATIENCE, REPLIES, WORDS, events_of, read
from tests.loopback.wall import Line, Seen, Wall
from tests.loopback.wall_client import ask, request
from tests.loopback.wall_replies import CHUNKED, DONE, EVENT_STREAM, LAST, chunk
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.alone]

CONNECT_S = 1.0
LOOK_S = 1.0  # how often silence is looked for
SLACK_S = 1.0  # a busy machine
DETECTION_S = 3.0
STALL_S = 1.0
WAYS = {"both ways": (True, True), "requests": (True, False), "replies": (False, True)}


class Far(NamedTuple):
    """A plane whose first Deployment is far away."""

    plane: Plane
    region: FarRegion


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    with started() as made:
        yield made


@contextmanager
def started() -> Iterator[Far]:
    with ExitStack() as stack:
        region = stack.enter_context(FarRegion())
        there = stack.enter_context(Wall(listen=region.listen))
        made = stack.enter_context(plane(walls=1, patience=PATIENCE))
        made.walls.insert(0, there)
        for wall in made.walls:
            wall.replies.update({**REPLIES, "paced": paced})
        yield Far(made, region)


def use(far: Far, model: str = "ok", near: str = "ok") -> None:
    """Fresh Deployments: `one` far away and ranked first, `two` near; all packets pass."""
    far.region.lose(requests=False, replies=False)
    one, two = far.plane.deployments({"models": {"m": model}}, {"models": {"m": near}})
    endpoint = msgspec.structs.replace(one.endpoints[0], host=far.region.host)
    far.plane.publish([msgspec.structs.replace(one, endpoints=(endpoint,)), two])


def timed(far: Far, **fields: object) -> tuple[int, str, float]:
    """Status, who answered, and how long it took."""
    began_s = time.monotonic()
    answer = ask(far.plane.port, request("m", **fields))  # type: ignore[arg-type]
    return answer.status, answer.headers.get("x-fleetgate-deployment", ""), time.monotonic() - began_s


@pytest.mark.parametrize("way", WAYS)
def test_row_2_a_blackhole_is_not_seen_and_soon_costs_nothing(far: Far, way: str) -> None:
    use(far)
    requests, replies = WAYS[way]
    far.region.lose(requests=requests, replies=replies)
    began_s = time.monotonic()
    # At once, so that each of them meets the blackhole with nothing known of it.
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda _: timed(far), range(4)))
    assert {(status, who) for status, who, _ in first} == {(200, "two")}
    # Somebody else is dialled after half the limit, since nobody knows how long dials take there.
    assert all(CONNECT_S * DIAL_SLOW_SHARE * 0.9 < took_s < CONNECT_S + SLACK_S for *_, took_s in first), first
    assert min(took_s for *_, took_s in first) < CONNECT_S * 0.9, first
    wait_for(lambda: timed(far)[2] < CONNECT_S * DIAL_SLOW_SHARE / 2)
    assert time.monotonic() - began_s < DETECTION_S
    later = [timed(far) for _ in range(10)]
    assert {(status, who) for status, who, _ in later} == {(200, "two")}
    # Its back-off is 2 s at least, so that at most one of them is its trial.
    assert sum(took_s > CONNECT_S * DIAL_SLOW_SHARE / 2 for *_, took_s in later) <= 1, later
    far.region.lose(requests=False, replies=False)
    wait_for(lambda: timed(far)[1] == "one")


async def paced(line: Line, seen: Seen) -> None:
    """The whole answer, an event at a time."""
    line.write(EVENT_STREAM + CHUNKED)
    for one in events_of(seen):
        line.write(chunk(one))
        await asyncio.sleep(0.05)
    line.end()
    line.write(LAST)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_rows_8_and_55_a_stream_whose_packets_are_lost_goes_on_or_says_so(
    far: Far, way: str, temperature: float
) -> None:
    use(far, "paced", "well")
    requests, replies = WAYS[way]
    with far.plane.client() as client:
        client.send(request("m", stream=True, temperature=temperature))
        wait_for(lambda: far.plane.walls[0].active == 1)
        time.sleep(0.5)
        far.region.lose(requests=requests, replies=replies)
        began_s = time.monotonic()
        answer = client.read()
        took_s = time.monotonic() - began_s
    said, events = read(answer.body)
    assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "one"
    if temperature == 0 or (answer.whole and way == "requests"):
        # Lost acknowledgements alone do not end a short answer: what fits into the window arrives.
        assert answer.whole and said == "".join(WORDS) and answer.body.endswith(DONE), answer.body[-300:]
    else:
        assert not answer.whole and events[-1]["error"]["code"] == "upstream_interrupted"  # type: ignore[index]
        assert said and "".join(WORDS).startswith(said)
    if not (answer.whole and way == "requests"):
        assert took_s < STALL_S + LOOK_S + SLACK_S, took_s
    far.region.lose(requests=False, replies=False)
    far.plane.wait_idle()


def test_row_55_a_region_that_comes_back_gets_its_share_again(far: Far) -> None:
    use(far)
    assert timed(far)[1] == "one"  # its connection is kept, so that the next request goes out without a connect
    far.region.lose(requests=False, replies=True)
    with ThreadPoolExecutor(8) as pool:
        lost = list(pool.map(lambda _: timed(far), range(16)))
    assert {(status, who) for status, who, _ in lost} == {(200, "two")}
    assert max(took_s for *_, took_s in lost) < UNHEARD_MS_MAX / 1000 + 1.5 + SLACK_S, lost
    far.region.lose(requests=False, replies=False)
    back_s = time.monotonic()
    wait_for(lambda: timed(far)[1] == "one")
    assert time.monotonic() - back_s < EJECTION_FIRST_S * (1 + JITTER) + SLACK_S + CONNECT_S
    assert [timed(far)[0] for _ in range(5)] == [200] * 5
