"""What happens when time passes: silent engines, stalled clients, requests that never end. The waits are made short.

Nothing here measures: each test waits for what must come in the end, and each limit has only to pass.
"""

import asyncio
import time
from collections.abc import Iterator

import pytest

from fleetgate.ipc.shared_memory import WorkerCell
from tests.loopback.wall import Line, Seen
from tests.loopback.wall_client import PATH, Client, request
from tests.loopback.wall_replies import CHUNKED, DONE, EVENT_STREAM, LAST, chunk, finish, role, tokens
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane
from tests.waiting import wait_for

MIB = 1024 * 1024
PATIENCE = {
    "fleetgate.core.health.timeouts.FIRST_UNKNOWN_S": 2.0,
    "fleetgate.proxy.request.deadlines.WHOLE_ANSWER_MAX_S": 2.0,
    "fleetgate.core.health.timeouts.STALL_UNKNOWN_S": 3.0,
    "fleetgate.core.health.timeouts.STALL_MIN_S": 3.0,
    "fleetgate.proxy.downstream.client_connection.HEAD_WAIT_MAX_S": 0.5,
    "fleetgate.proxy.downstream.incoming_body.BODY_GRACE_S": 0.5,
    "fleetgate.proxy.downstream.client_connection.IDLE_MAX_S": 1.0,
    "fleetgate.proxy.downstream.client_connection.UNREAD_MAX_S": 4.0,
}


@pytest.fixture(scope="module")
def two() -> Iterator[Plane]:
    with plane(walls=2, patience=PATIENCE) as made:
        yield made


@pytest.mark.parametrize(("model", "stream"), [("silent", False), ("silent", True), ("held-early", True)])
def test_rows_6_and_7_a_silent_engine_is_left_for_another(two: Plane, model: str, stream: bool) -> None:
    two.use({}, {"models": {name: "ok" for name in EVERY_MODEL}})
    two.wall.hold()
    answer = two.ask(request(model, stream))
    assert answer.status == 200 and answer.whole and answer.headers["x-fleetgate-deployment"] == "two"
    wait_for(lambda: two.wall.seen[0].gone_s > 0)
    two.wait_idle()


def test_when_all_are_silent_it_is_504(two: Plane) -> None:
    two.use({}, {})
    answer = two.ask(request("silent"))
    assert (answer.status, answer.code) == (504, "upstream_timeout")
    assert len(two.wall.seen) == len(two.walls[1].seen) == 1
    two.wait_idle()


def test_row_8_a_stream_that_stalls_ends_loudly(two: Plane) -> None:
    two.use({})
    two.wall.hold()
    answer = two.ask(request("held", stream=True))
    assert b"tok" in answer.body and b"upstream_interrupted" in answer.body and not answer.whole
    wait_for(lambda: two.wall.seen[0].gone_s > 0)
    two.wait_idle()


def test_comments_are_life(two: Plane) -> None:
    """An engine that thinks for long and says so is not cut off."""

    async def thinking(line: Line, seen: Seen) -> None:
        line.write(EVENT_STREAM + CHUNKED + chunk(role("m")) + chunk(tokens("m", 1)[0]))
        for _ in range(14):
            await asyncio.sleep(0.25)
            line.write(chunk(b": still here\n\n"))
        line.end()
        line.write(chunk(finish("m")) + chunk(DONE) + LAST)

    two.wall.replies["m"] = thinking
    two.use({})
    answer = two.ask(request("m", stream=True))
    assert answer.whole and answer.body.count(b": still here\n\n") == 14 and answer.body.endswith(DONE)


async def endless(line: Line, seen: Seen) -> None:
    """Content for as long as anybody takes it."""
    line.write(EVENT_STREAM + CHUNKED + chunk(role("m")))
    while not line.gone.is_set():
        line.write(chunk(tokens("m", 7)[-1]) * 50)
        await line.drain()
        await asyncio.sleep(0)


def timeouts(made: Plane) -> int:
    totals = made.rig.board.series_totals()
    return sum(count for name, count in totals.items() if 'failure="timeout"' in name)


def test_a_client_that_stops_reading_is_dropped_and_the_engine_is_not_blamed(two: Plane) -> None:
    two.wall.replies["endless"] = endless
    two.use({"models": {"endless": "endless", "ok": "ok"}})
    before = timeouts(two)
    clients = [two.client(receive_bytes=8 * 1024) for _ in range(4)]
    for client in clients:
        client.send(request("endless", stream=True))
    wait_for(lambda: len([seen for seen in two.wall.seen if seen.gone_s]) == 4, timeout_s=40)
    two.wait_idle()
    assert two.ask(request("ok")).headers["x-fleetgate-deployment"] == "one"
    totals = two.rig.board.series_totals()
    assert timeouts(two) == before
    assert any('outcome="client_gone"' in name and count >= 4 for name, count in totals.items())
    for client in clients:
        client.socket.close()


def test_an_answer_that_nobody_fetches_is_given_up(two: Plane) -> None:
    two.use({})
    with two.client(receive_bytes=8 * 1024) as client:
        client.send(request("ok", wall={"size": 7 * MIB}))
        wait_for(lambda: bool(two.wall.seen))
        two.wait_idle()
        wait_for(lambda: two.rig.board.get(0, WorkerCell.CONNECTIONS) == 0, timeout_s=40)


def test_an_answer_that_is_fetched_slowly_is_not(two: Plane) -> None:
    two.use({})
    body = answer_of("ok", "x" * 7 * MIB)
    with two.client(receive_bytes=64 * 1024) as client:
        client.send(request("ok", wall={"size": 7 * MIB}))
        client.read_until(b"\r\n\r\n")
        got = client.buffered
        while got < len(body):  # in all far longer than any of the limits
            part = client.socket.recv(min(MIB, len(body) - got))
            assert part, f"cut after {got} of {len(body)} bytes"
            got += len(part)
            time.sleep(0.05)


def test_requests_that_never_end_are_408_and_idle_connections_close(two: Plane) -> None:
    two.use({})
    whole = request("ok")
    begun = {name: Client(two.port) for name in ("nothing", "a line", "a head", "a body", "chunks", "kept")}
    begun["a line"].send(whole[:20])
    begun["a head"].send(whole.partition(b"\r\n\r\n")[0])
    begun["a body"].send(whole[:-3])
    head = f"POST {PATH} HTTP/1.1\r\nHost: chat.test\r\nTransfer-Encoding: chunked\r\n\r\n"
    begun["chunks"].send(head.encode() + b"5\r\nab")
    assert begun["kept"].ask(whole).status == 200
    for name in ("a line", "a head", "a body", "chunks"):
        answer = begun[name].read()
        assert (answer.status, answer.code) == (408, "invalid_request"), name
        assert answer.headers["connection"] == "close"
        assert begun[name].closed()
    assert begun["nothing"].closed() and begun["kept"].closed()
    assert two.seen() == ["ok"]
    for client in begun.values():
        client.socket.close()


def test_an_answer_that_is_not_streamed_has_the_time_that_such_answers_take() -> None:
    """Once it is known how long they take here, a silent engine is left long before the SDKs' ten minutes."""
    with plane(walls=2, patience={"fleetgate.core.health.timeouts.WHOLE_MIN_S": 1.0}) as made:
        made.use({}, {"models": {name: "ok" for name in EVERY_MODEL}})
        for _ in range(25):
            assert made.ask(request("ok", max_tokens=20)).status == 200
        begun_s = time.monotonic()
        answer = made.ask(request("silent", max_tokens=20))
        assert answer.status == 200 and answer.headers["x-fleetgate-deployment"] == "two"
        assert time.monotonic() - begun_s < 10.0
        # One that may become long has longer: three times what so many tokens would take.
        slow = made.ask(request("slow", max_tokens=100_000, wall={"delay_s": 3.0}))
        assert slow.status == 200 and slow.headers["x-fleetgate-deployment"] == "one"
        made.wait_idle()
