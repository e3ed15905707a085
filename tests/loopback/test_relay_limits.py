"""Clients that leave, limits that hold, queues that end, memory that stays: the ledger and the wall count."""

import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleetgate.core.model import Admission, Resilience, Slo
from tests.loopback.wall_client import ask, post, request
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_replies import stream_of
from tests.loopback.wall_rig import EVERY_MODEL, Plane, plane
from tests.waiting import wait_for

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def one() -> Iterator[Plane]:
    with plane() as made:
        yield made


def peak_bytes(made: Plane) -> int:
    """The most memory that the first worker ever had."""
    status = Path(f"/proc/{made.rig.processes[0].pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


# --- clients that leave -----------------------------------------------------------------------------------------------

PHASES = {
    "before the answer": ("silent", False),
    "before the first event": ("silent", True),
    "after the role event": ("held-early", True),
    "in the stream": ("held", True),
    "while a whole answer is made": ("held", False),
}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_the_engine(one: Plane, phase: str, how: str) -> None:
    one.use({"concurrency_max": 1})
    one.wall.hold()
    model, stream = PHASES[phase]
    client = one.client()
    client.send(request(model, stream))
    wait_for(lambda: one.seen() == [model])
    if phase == "in the stream":
        client.read_until(b"tok")
    assert one.in_flight() == 1
    if how == "reset":
        client.reset()
    else:
        client.socket.close()
    wait_for(lambda: one.wall.seen[0].gone_s > 0)
    one.wait_idle()
    assert one.ask(request("ok")).status == 200, "its place is free again"
    one.wall.release()


def test_a_client_that_leaves_the_queue_is_never_sent(one: Plane) -> None:
    one.use({"concurrency_max": 1})
    one.wall.hold()
    with one.client() as holder:
        holder.send(request("held"))
        wait_for(lambda: one.in_flight() == 1)
        waiting = [one.client() for _ in range(5)]
        for client in waiting:
            client.send(request("m"))
        wait_for(lambda: one.rig.board.waiting_total(0) == 5)
        for client in waiting[::2]:
            client.socket.close()
        wait_for(lambda: one.rig.board.waiting_total(0) == 2)
        one.wall.release()
        assert holder.read().status == 200
        for client in waiting[1::2]:
            assert client.read().status == 200
            client.socket.close()
    one.wait_idle()
    assert one.seen() == ["held", "m", "m"]


def test_a_client_that_leaves_while_connecting_is_never_sent(one: Plane) -> None:
    """A listener whose backlog is full lets a connect hang."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        plugs = []
        for _ in range(3):
            plug = socket.socket()
            plug.setblocking(False)
            plug.connect_ex(full.getsockname())
            plugs.append(plug)
        (made,) = one.deployments({})
        endpoint = made.endpoints[0].__class__(
            slot=made.slot, scheme="http", host="127.0.0.1", port=full.getsockname()[1], base_path="/v1"
        )
        hanging = made.__class__(
            slot=made.slot, name="one", region="r", engine="openai", models=EVERY_MODEL, endpoints=(endpoint,),
            egress_checked=False,
        )  # fmt: skip
        one.publish([hanging], resilience=Resilience(connect_timeout_s=30.0))
        client = one.client()
        client.send(request("m"))
        wait_for(lambda: one.in_flight() == 1)
        client.socket.close()
        one.wait_idle()
        for plug in plugs:
            plug.close()


def test_many_clients_that_leave_at_any_moment_leave_nothing(one: Plane) -> None:
    one.use({"concurrency_max": 4})
    one.wall.hold()

    def visit(number: int) -> None:
        model, stream = [*PHASES.values(), ("ok", True), ("in-pieces", True)][number % 7]
        with one.client() as client:
            client.send(request(model, stream))
            if number % 3:
                client.glance(0.001 * (number % 11))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(visit, range(210)))
    one.wait_idle()
    one.wall.release()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: one.ask(request("ok")).status, range(40))) == {200}
    one.wait_idle()


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_two_hundred_clients_never_pass_a_limit_of_five(workers: int) -> None:
    with plane(workers=workers) as made:
        made.use({"concurrency_max": 5}, admission=Admission(queue_max=400))
        total, failed = 200, []

        def visit(number: int) -> None:
            answer = ask(made.port, request("slow", stream=number % 2 == 0, wall={"delay_s": 0.004}))
            if answer.status != 200 or not answer.whole:
                failed.append(answer)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(total)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed
        assert len(made.wall.seen) == total
        assert made.wall.most_active <= 5
        made.wait_idle()


@pytest.mark.parametrize("queue_max", [0, 2])
def test_the_queue_refuses_exactly_what_is_over_it(one: Plane, queue_max: int) -> None:
    one.use({"concurrency_max": 3}, admission=Admission(queue_max=queue_max, queue_timeout_s=60))
    one.wall.hold()
    clients = [one.client() for _ in range(12)]
    for sent, client in enumerate(clients, 1):
        client.send(request("held"))
        wait_for(lambda sent=sent: one.in_flight() + one.rig.board.waiting_total(0) >= min(sent, 3 + queue_max))  # type: ignore[misc]
    refused = [client.read() for client in clients[3 + queue_max :]]
    assert len(refused) == 9 - queue_max
    for answer in refused:
        assert (answer.status, answer.code) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    one.wall.release()
    assert all(client.read().status == 200 for client in clients[: 3 + queue_max])
    for client in clients:
        client.socket.close()
    one.wait_idle()
    assert len(one.wall.seen) == 3 + queue_max


@pytest.mark.parametrize("limit", ["queue timeout", "client's own", "slo"])
def test_who_waits_too_long_gets_429(one: Plane, limit: str) -> None:
    options: dict[str, object] = {"admission": Admission(queue_timeout_s=0.2 if limit == "queue timeout" else 60)}
    if limit == "slo":
        options["slo"] = Slo(ttft_s=0.2)
    headers = ["x-fleetgate-timeout-ms: 200"] if limit == "client's own" else []
    one.use({"concurrency_max": 1}, **options)
    one.wall.hold()
    with one.client() as holder:
        holder.send(request("held"))
        wait_for(lambda: one.in_flight() == 1)
        answer = one.ask(request("m", headers=headers))
        assert (answer.status, answer.code) == (429, "capacity_exhausted")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        one.wall.release()
        assert holder.read().status == 200
    one.wait_idle()
    assert one.seen() == ["held"]


def test_who_waits_is_served_in_order(one: Plane) -> None:
    one.use({"concurrency_max": 1}, admission=Admission(queue_timeout_s=60))
    one.wall.hold()
    clients = []
    for number in range(8):
        client = one.client()
        client.send(request("held", number=number))
        clients.append(client)
        wait_for(lambda number=number: one.in_flight() + one.rig.board.waiting_total(0) == number + 1)  # type: ignore[misc]
    one.wall.release()
    assert all(client.read().status == 200 for client in clients)
    assert [seen.ask["number"] for seen in one.wall.seen] == list(range(8))
    for client in clients:
        client.socket.close()


def test_overflow_fills_the_first_rank_first() -> None:
    with plane(walls=2) as made:
        made.use({"concurrency_max": 3}, {"concurrency_max": 3})
        for wall in made.walls:
            wall.hold()
        clients = [made.client() for _ in range(6)]
        for sent, client in enumerate(clients, 1):
            client.send(request("held"))
            wait_for(lambda sent=sent: made.in_flight() == sent)  # type: ignore[misc]
        wait_for(lambda: [len(wall.seen) for wall in made.walls] == [3, 3])
        for wall in made.walls:
            wall.release()
        names = [client.read().headers["x-fleetgate-deployment"] for client in clients]
        assert names == ["one"] * 3 + ["two"] * 3
        for client in clients:
            client.socket.close()


def test_a_dead_first_rank_under_load_loses_nothing() -> None:
    with plane(walls=2) as made:
        made.use({"concurrency_max": 4}, {"concurrency_max": 8}, admission=Admission(queue_max=400))
        fallen = threading.Event()

        def visit(number: int) -> str:
            if number == 60:
                made.wall.fall()
                fallen.set()
            with made.client() as client:
                answer = client.ask(request("slow", wall={"delay_s": 0.003}))
            assert answer.status == 200, answer.body
            return answer.headers["x-fleetgate-deployment"]

        with ThreadPoolExecutor(12) as pool:
            names = Counter(pool.map(visit, range(300)))
        assert fallen.is_set() and names["two"] > 100 and sum(names.values()) == 300
        made.wait_idle()


# --- memory and pace --------------------------------------------------------------------------------------------------


def test_a_large_answer_to_a_slow_client_is_bounded(one: Plane) -> None:
    """20 MiB that nobody reads for a while: 8 MiB are held back to be checked, and little more."""
    one.use({})
    one.ask(request("ok", wall={"size": 9 * MIB}))
    before = peak_bytes(one)
    size = 60 * MIB
    with one.client(receive_bytes=64 * 1024) as client:
        client.send(request("ok", wall={"size": size}))
        client.read_until(b"\r\n\r\n")
        assert one.in_flight() == 1
        client.socket.settimeout(30)
        grown = peak_bytes(one) - before
        assert grown < 24 * MIB, f"{grown / MIB:.0f} MiB for a client that does not read"
    one.wait_idle()


@pytest.mark.parametrize("size", [7 * MIB, 20 * MIB])
def test_a_large_answer_is_whole_and_the_next_one_is_too(one: Plane, size: int) -> None:
    """A client slower than the engine holds up its own connection upstream, and never the next request on it."""
    one.use({})
    with one.client(receive_bytes=16 * 1024) as slow:
        slow.send(request("ok", wall={"size": size}))
        wait_for(lambda: bool(one.wall.seen))
        if size < 8 * MIB:
            one.wait_idle()  # it was small enough to be held back whole, so the engine is free already
            with one.client() as other:
                for _ in range(5):
                    assert other.ask(request("ok")).body == answer_of("ok")
        answer = slow.read()
        assert answer.body == answer_of("ok", "x" * size) and answer.whole
        assert slow.ask(request("ok")).status == 200
    one.wait_idle()


def test_a_long_stream_to_a_slow_client_is_whole(one: Plane) -> None:
    one.use({})
    count = 30_000
    with one.client(receive_bytes=16 * 1024) as slow:
        slow.send(request("ok", stream=True, wall={"count": count}))
        wait_for(lambda: bool(one.wall.seen))
        with one.client() as other:
            for _ in range(5):
                assert other.ask(request("ok", stream=True)).whole
        answer = slow.read()
        assert answer.body == b"".join(stream_of("ok", count)) and answer.whole
    one.wait_idle()


def test_answers_that_nobody_reads_do_not_pile_up(one: Plane) -> None:
    """A pipeline of small requests for large answers: the next one waits until the last one has left."""
    one.use({})
    one.ask(request("ok", wall={"size": 4 * MIB}))
    before = peak_bytes(one)
    with one.client(receive_bytes=16 * 1024) as client:
        client.send(request("ok", wall={"size": 4 * MIB}) * 40)
        wait_for(lambda: bool(one.wall.seen))
        one.wait_idle()
        with one.client() as other:
            for _ in range(50):
                assert other.ask(request("ok")).status == 200
        grown = peak_bytes(one) - before
        assert grown < 40 * MIB, f"{grown / MIB:.0f} MiB of unread answers"
        for _ in range(40):
            assert client.read().body == answer_of("ok", "x" * 4 * MIB)


def test_large_bodies_to_a_slow_engine_are_bounded(one: Plane) -> None:
    """Each 20 MiB body is held once or twice while it comes and goes, and is gone afterwards."""
    one.use({"concurrency_max": 2})
    body = b'{"model":"ok","pad":"%b"}' % (b"a" * (19 * MIB))
    before = peak_bytes(one)
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: one.ask(post(body)).status, range(6))) == {200}
    grown = peak_bytes(one) - before
    assert grown < 200 * MIB, f"{grown / MIB:.0f} MiB for two bodies of 19 MiB at a time"
    one.wait_idle()


def test_kept_connections_that_the_engine_closed_are_no_failure(one: Plane) -> None:
    one.use({})
    with one.client() as client:
        for _ in range(5):
            assert client.ask(request("ok")).status == 200
            one.wall.call(close_all(one))
    one.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_kept_connection_that_breaks_at_once_is_no_failure(one: Plane, stream: bool) -> None:
    """The request is sent again on a new connection, and nothing is held against the Endpoint."""
    one.use({})
    with one.client() as client:
        for _ in range(10):
            answer = client.ask(request("stale", stream))
            assert answer.status == 200 and answer.whole and answer.headers["x-fleetgate-attempts"] == "1"
    failures = [name for name, count in one.rig.board.series_totals().items() if "attempt_failures" in name and count]
    assert not [name for name in failures if "broken" in name]
    one.wait_idle()


async def close_all(made: Plane) -> None:
    """What an engine does with idle connections after some seconds."""
    for line in list(made.wall.lines):
        line.transport.close()


def test_a_removed_deployment_keeps_no_connection(one: Plane) -> None:
    one.use({})
    one.wall.hold()
    with one.client() as running, one.client() as client:
        assert client.ask(request("ok")).status == 200
        running.send(request("held", stream=True))
        running.read_until(b"tok")
        one.publish([])
        one.wall.release()
        assert running.read_until(b"[DONE]")
        wait_for(lambda: not one.wall.lines)


def test_an_engine_that_never_ends_its_framing_keeps_no_connection(one: Plane) -> None:
    """The client has [DONE] and its end; the connection waits a moment for the last chunk and is then given up."""
    one.use({})
    answer = one.ask(request("no-end", stream=True))
    assert answer.whole and answer.body.endswith(b"[DONE]\n\n")
    (number,) = one.wall.carriers
    wait_for(lambda: number not in {line.number for line in list(one.wall.lines)})
