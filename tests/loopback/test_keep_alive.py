"""A stream that is long in coming: its client hears that it is alive, and the request can still move."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_replies import stream_of
from tests.loopback.wall_rig import Plane, plane

ALIVE = b": keep-alive\n\n"
REFUSED = {"error": {"message": "too\nlong", "type": "invalid_request_error", "param": None, "code": "too_long"}}


async def refuses_late(line: Line, seen: Seen) -> None:
    """An error of the client's after a while, as JSON over several lines."""
    await asyncio.sleep(seen.option("delay_s", 0))
    body = json.dumps(REFUSED, indent=1).encode()
    line.end()
    line.write(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
    line.write(body)


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    patience = {
        "fleetgate.proxy.request.deadlines.COMMENT_EVERY_S": 1.0,
        "fleetgate.core.health.timeouts.FIRST_UNKNOWN_S": 4.0,
    }
    with plane(walls=2, patience=patience) as made:
        for wall in made.walls:
            wall.replies["refuses-late"] = refuses_late
        yield made


def use(made: Plane, *engines: str) -> None:
    made.use(*({"models": {"m": name}} for name in engines))


def ask(made: Plane, delay_s: float = 0.0, stream: bool = True) -> Answer:
    return made.ask(request("m", stream=stream, wall={"delay_s": delay_s}))


def test_its_client_hears_that_it_is_alive(two: Plane) -> None:
    use(two, "slow")
    answer = ask(two, 2.6)
    assert answer.status == 200 and answer.whole
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-fleetgate-deployment"] == "one" and answer.headers["x-fleetgate-attempts"] == "1"
    assert answer.body.startswith(ALIVE)
    assert answer.body.replace(ALIVE, b"") == b"".join(stream_of("m")), "who answers needs not be named again"


def test_it_can_still_move(two: Plane) -> None:
    use(two, "silent", "ok")
    answer = ask(two)
    assert answer.status == 200 and answer.whole
    assert answer.headers["x-fleetgate-deployment"] == "one"
    named = b": fleetgate deployment=two region=region-two attempts=2\n\n"
    assert answer.body.replace(ALIVE, b"") == named + b"".join(stream_of("m"))
    two.wait_idle()


def test_a_failure_is_said_inside_the_stream(two: Plane) -> None:
    use(two, "silent", "500")
    answer = ask(two)
    assert answer.status == 200 and not answer.whole
    error = json.loads(answer.body.replace(ALIVE, b"").removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_error" and b"[DONE]" not in answer.body
    two.wait_idle()


def test_an_error_of_the_clients_becomes_an_event(two: Plane) -> None:
    use(two, "refuses-late")
    answer = ask(two, 2.0)
    assert answer.status == 200 and answer.whole
    first, done = answer.body.replace(ALIVE, b"").split(b"\n\n")[:2]
    assert json.loads(first.removeprefix(b"data: ")) == REFUSED and done == b"data: [DONE]"


def test_an_answer_that_is_not_streamed_waits_in_silence(two: Plane) -> None:
    use(two, "slow")
    answer = ask(two, 2.6, stream=False)
    assert answer.status == 200 and answer.json()["choices"]
