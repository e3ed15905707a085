"""`Idempotency-Key`: what is sent twice is worked once, over all workers. FAULTS.md row 43."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.proxy.downstream import idempotency
from tests.loopback.wall_client import Answer, request
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def two_workers() -> Iterator[Plane]:
    with plane(workers=2, walls=2) as made:
        yield made


def named(name: str, model: str = "ok", stream: bool = False, **fields: object) -> bytes:
    return request(model, stream, headers=[f"Idempotency-Key: {name}"], **fields)


def test_row_43_the_same_request_again_gets_the_same_answer_from_every_worker(two_workers: Plane) -> None:
    two_workers.use({})
    first = two_workers.ask(named("a"))
    assert first.status == 200 and "idempotent-replayed" not in first.headers
    for _ in range(8):  # new connections: each worker gets some
        again = two_workers.ask(named("a"))
        assert again.status == 200 and again.body == first.body and again.headers["idempotent-replayed"] == "true"
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers["x-fleetgate-deployment"] == first.headers["x-fleetgate-deployment"]
    assert len(two_workers.wall.seen) == 1
    with two_workers.client() as client:  # the connection stays good
        assert client.ask(named("a")).body == first.body
        assert client.ask(request("ok")).status == 200


def test_without_the_header_and_under_other_names_each_is_worked(two_workers: Plane) -> None:
    two_workers.use({})
    for data in (request("ok"), request("ok"), named("b1"), named("b2")):
        assert two_workers.ask(data).status == 200
    assert len(two_workers.wall.seen) == 4


def test_row_43_while_the_first_runs_the_second_is_told_so(two_workers: Plane) -> None:
    two_workers.use({})
    two_workers.wall.hold()
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(two_workers.ask(named("c", "held"))))
    thread.start()
    wait_for(lambda: len(two_workers.wall.seen) == 1)
    for _ in range(6):
        busy = two_workers.ask(named("c", "held"))
        assert (
            busy.status == 409
            and busy.headers["retry-after"] == "1"
            and "in progress" in busy.json()["error"]["message"]
        )
    two_workers.wall.release()
    thread.join(20)
    assert answers[0].status == 200
    assert two_workers.ask(named("c", "held")).body == answers[0].body
    assert len(two_workers.wall.seen) == 1


def test_another_request_under_the_same_name_is_refused(two_workers: Plane) -> None:
    two_workers.use({})
    assert two_workers.ask(named("d")).status == 200
    other = two_workers.ask(named("d", temperature=1))
    assert other.status == 422 and "use a new key" in other.json()["error"]["message"]
    assert two_workers.ask(named("x" * 300)).status == 400


def test_a_stream_that_ended_whole_is_not_worked_again_and_one_that_broke_is(two_workers: Plane) -> None:
    two_workers.use({})
    assert two_workers.ask(named("e", stream=True)).whole
    again = two_workers.ask(named("e", stream=True))
    assert again.status == 409 and "not kept" in again.json()["error"]["message"]
    assert again.headers["x-should-retry"] == "false"
    two_workers.ask(named("f", "rst-mid", stream=True, temperature=1))
    two_workers.ask(named("f", "rst-mid", stream=True, temperature=1))
    assert two_workers.seen().count("rst-mid") == 2


def test_what_failed_may_be_asked_again(two_workers: Plane) -> None:
    two_workers.use({})
    for _ in range(2):
        assert two_workers.ask(named("g", "400")).status == 400
    assert two_workers.seen().count("400") == 2


def test_a_client_that_leaves_frees_its_name(two_workers: Plane) -> None:
    two_workers.use({})
    two_workers.wall.hold()
    client = two_workers.client()
    client.send(named("h", "held"))
    wait_for(lambda: len(two_workers.wall.seen) == 1)
    client.reset()
    wait_for(lambda: two_workers.wall.seen[0].gone_s > 0)
    two_workers.wall.release()
    wait_for(lambda: two_workers.ask(named("h", "held")).status == 200)


def test_a_worker_that_dies_frees_its_names() -> None:
    with plane(workers=1) as made:
        made.wall.hold()
        client = made.client()
        client.send(named("i", "held"))
        wait_for(lambda: len(made.wall.seen) == 1)
        made.rig.processes[0].kill()
        made.rig.processes[0].wait(10)
        made.rig.start(0)
        made.wall.release()
        wait_for(lambda: made.rig.board.get(0, WorkerCell.HEARTBEAT_MS) > time.monotonic() * 1000 - 500)
        assert made.ask(named("i", "held")).status == 200


def test_old_and_surplus_answers_are_removed(two_workers: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    two_workers.use({})
    folder = two_workers.rig.data_dir / idempotency.DIRECTORY
    assert two_workers.ask(named("j")).status == 200
    for path in folder.iterdir():
        os.utime(path, (time.time() - idempotency.KEPT_S - 60,) * 2)
    assert "idempotent-replayed" not in two_workers.ask(named("j")).headers
    for number in range(5):
        assert two_workers.ask(named(f"k{number}")).status == 200
    monkeypatch.setattr(idempotency, "FILES_MAX", 3)
    idempotency.remove_expired(two_workers.rig.data_dir)
    assert len(list(folder.iterdir())) == 3
    assert two_workers.ask(named("k4")).headers["idempotent-replayed"] == "true"


def test_row_68_where_the_disk_keeps_nothing_the_request_is_worked_as_without_the_header(two_workers: Plane) -> None:
    two_workers.use({})
    assert two_workers.ask(named("l")).status == 200
    folder = two_workers.rig.data_dir / idempotency.DIRECTORY
    kept = folder.rename(folder.with_name("kept"))
    folder.write_text("in the way")
    try:
        for _ in range(4):
            answer = two_workers.ask(named("l"))
            assert answer.status == 200 and "idempotent-replayed" not in answer.headers
    finally:
        folder.unlink()
        kept.rename(folder)
    assert two_workers.ask(named("l")).headers["idempotent-replayed"] == "true"
