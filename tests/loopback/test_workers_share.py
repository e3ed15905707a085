"""Several workers on one port: one ledger, one queue bound, and a Snapshot that changes under load."""

import signal
import threading
from collections.abc import Iterator

import pytest

from fleetgate.core.model import Admission, Snapshot, encode_snapshot
from fleetgate.ipc.shared_memory import WorkerCell
from fleetgate.ipc.signed_file import sign
from tests.loopback.rig import SIGNING_KEY, gateway, write_snapshot
from tests.loopback.wall_client import Client, request
from tests.loopback.wall_replies import stream_of
from tests.loopback.wall_rig import Plane, plane
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def pair() -> Iterator[Plane]:
    with plane(workers=2, walls=2) as made:
        yield made


def connections(made: Plane, worker: int) -> int:
    return made.rig.board.get(worker, WorkerCell.CONNECTIONS)


def client_of(made: Plane, worker: int) -> Client:
    """A connection that a certain worker accepted; the kernel chooses, so others are closed until it fits."""
    workers = range(made.rig.board.workers)
    while True:
        before = [connections(made, w) for w in workers]
        client = made.client()
        wait_for(lambda before=before: sum(connections(made, w) for w in workers) > sum(before))  # type: ignore[misc]
        if connections(made, worker) > before[worker]:
            return client
        client.socket.close()
        wait_for(lambda before=before: [connections(made, w) for w in workers] == before)  # type: ignore[misc]


def test_a_limit_holds_over_workers_and_a_freed_place_wakes_the_other(pair: Plane) -> None:
    for holder_at, waiter_at in ((0, 1), (1, 0)):
        pair.use({"concurrency_max": 1}, admission=Admission(queue_timeout_s=60))
        pair.wall.hold()
        holder, waiter = client_of(pair, holder_at), client_of(pair, waiter_at)
        holder.send(request("held"))
        wait_for(lambda: pair.in_flight() == 1)
        waiter.send(request("ok"))
        wait_for(lambda: pair.rig.board.waiting_total(0) == 1)
        assert pair.rig.board.get(waiter_at, WorkerCell.WAITING) == 1
        assert pair.seen() == ["held"]
        pair.wall.release()
        assert holder.read().status == 200 and waiter.read().status == 200
        holder.socket.close()
        waiter.socket.close()
        pair.wait_idle()
        assert pair.wall.most_active == 1


def test_the_queue_bound_holds_over_workers(pair: Plane) -> None:
    pair.use({"concurrency_max": 1}, admission=Admission(queue_max=2, queue_timeout_s=60))
    pair.wall.hold()
    clients = [client_of(pair, number % 2) for number in range(5)]
    for sent, client in enumerate(clients, 1):
        client.send(request("held"))
        wait_for(lambda sent=sent: pair.in_flight() + pair.rig.board.waiting_total(0) >= min(sent, 3))  # type: ignore[misc]
    assert [client.read().code for client in clients[3:]] == ["queue_full"] * 2
    pair.wall.release()
    assert [client.read().status for client in clients[:3]] == [200] * 3
    for client in clients:
        client.socket.close()
    pair.wait_idle()


# --- Snapshots --------------------------------------------------------------------------------------------------------


def test_changes_under_load_drop_nothing_and_removed_deployments_get_no_new_work(pair: Plane) -> None:
    stop, bad = threading.Event(), []

    def load(stream: bool) -> None:
        with pair.client() as client:
            while not stop.is_set():
                answer = client.ask(request("slow", stream, wall={"delay_s": 0.002}))
                if answer.status != 200 or not answer.whole:
                    bad.append(answer)

    one, two = pair.deployments({"concurrency_max": 3}, {"concurrency_max": 8})
    pair.publish([one, two], admission=Admission(queue_max=100))
    threads = [threading.Thread(target=load, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for made in ([two], [one, two], [one], [two, one], [one, two], [two]):
            names = [deployment.name for deployment in made]
            pair.rig.publish(gateways=(gateway(*names, admission=Admission(queue_max=100)),), deployments=tuple(made))
            pair.rig.wait_until_used()
            seen = len(pair.walls[1].seen)
            wait_for(lambda seen=seen, names=names: "two" not in names or len(pair.walls[1].seen) > seen)  # type: ignore[misc]
        wait_for(lambda: pair.walls[0].active == 0)
        before = len(pair.walls[0].seen)
        after = len(pair.walls[1].seen)
        wait_for(lambda: len(pair.walls[1].seen) > after + 100)
        assert len(pair.walls[0].seen) == before, "a removed Deployment got new work"
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not bad
    pair.wait_idle()


def test_who_waits_moves_to_the_new_snapshot(pair: Plane) -> None:
    (one,) = pair.deployments({"concurrency_max": 1})
    pair.publish([one], admission=Admission(queue_timeout_s=60))
    pair.wall.hold()
    with pair.client() as holder, pair.client() as waiter:
        holder.send(request("held"))
        wait_for(lambda: pair.in_flight() == 1)
        waiter.send(request("ok"))
        wait_for(lambda: pair.rig.board.waiting_total(0) == 1)
        larger = one.__class__(**{**{f: getattr(one, f) for f in one.__struct_fields__}, "concurrency_max": 2})
        pair.rig.publish(gateways=(gateway("one"),), deployments=(larger,))
        assert waiter.read().status == 200, "a raised limit is room for those who wait"
        waiter.send(request("m"))
        assert waiter.read().status == 200
        pair.wall.release()
        assert holder.read().status == 200
    pair.wait_idle()


def test_who_waits_for_a_model_that_goes_is_told(pair: Plane) -> None:
    (one,) = pair.deployments({"concurrency_max": 1})
    pair.publish([one], admission=Admission(queue_timeout_s=60))
    pair.wall.hold()
    with pair.client() as holder, pair.client() as waiter:
        holder.send(request("held"))
        wait_for(lambda: pair.in_flight() == 1)
        waiter.send(request("ok"))
        wait_for(lambda: pair.rig.board.waiting_total(0) == 1)
        pair.rig.publish()
        assert waiter.read().status in (404, 503)
        pair.wall.release()
        assert holder.read().status == 200, "what runs ends on the old Snapshot"
    pair.wait_idle()


def signed(**parts: object) -> bytes:
    fields = {"version": 10**9, "made_at_s": 1.0, **parts}
    return sign(encode_snapshot(Snapshot(**fields)), SIGNING_KEY)  # type: ignore[arg-type]


BROKEN = {
    "empty": b"",
    "not JSON": b"\x00\x01\x02",
    "half": signed(emptied=True)[:-10],
    "not signed": encode_snapshot(Snapshot(version=10**9, made_at_s=1.0, emptied=True)),
    "signed with another key": sign(encode_snapshot(Snapshot(version=10**9, made_at_s=1.0, emptied=True)), b"x" * 32),
    "another shape": sign(b'{"version":"many"}', SIGNING_KEY),
    "no gateway": signed(),
    "older": signed(version=1, emptied=True),
    "unknown strategy": signed(version=10**9 + 1, gateways=(gateway(strategy="dice"),)),
    "missing deployment": signed(version=10**9 + 2, gateways=(gateway("nobody"),)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_last_good_snapshot_stays_whatever_happens_to_the_file(pair: Plane, name: str) -> None:
    pair.use({})
    versions = [pair.rig.board.get(w, WorkerCell.SNAPSHOT_VERSION) for w in range(2)]
    write_snapshot(pair.rig.data_dir, BROKEN[name])
    beats = [pair.rig.board.get(w, WorkerCell.HEARTBEAT_MS) for w in range(2)]
    wait_for(lambda: all(pair.rig.board.get(w, WorkerCell.HEARTBEAT_MS) > beat + 250 for w, beat in enumerate(beats)))
    assert [pair.rig.board.get(w, WorkerCell.SNAPSHOT_VERSION) for w in range(2)] == versions
    assert pair.ask(request("ok")).status == 200
    (pair.rig.data_dir / "snapshot").unlink()
    assert pair.ask(request("ok")).status == 200
    pair.rig.version = max(pair.rig.version, 10**9 + 2)
    pair.use({})
    assert pair.ask(request("ok")).status == 200, "the next good one is taken"


@pytest.mark.parametrize("what", ["gone", "damaged"])
def test_a_worker_starts_from_the_last_good_snapshot(what: str) -> None:
    with plane() as made:
        assert made.ask(request("ok")).status == 200
        file, copy = made.rig.data_dir / "snapshot", made.rig.data_dir / "snapshot.good"
        wait_for(lambda: copy.exists() and copy.read_bytes() == file.read_bytes())
        if what == "gone":
            (made.rig.data_dir / "snapshot").unlink()
        else:
            write_snapshot(made.rig.data_dir, b"damaged")
        made.rig.processes[0].kill()
        made.rig.processes[0].wait()
        made.rig.board.clear_worker(0)
        made.rig.start(0)
        made.rig.wait_until_used()
        assert made.ask(request("ok")).status == 200
        made.use()
        assert made.ask(request("ok")).status == 200, "the next good one is taken"


# --- the end ----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_running_answers_and_uploads_end() -> None:
    with plane() as made:
        made.wall.hold()
        streaming, uploading, idle, waiting = (made.client() for _ in range(4))
        assert idle.ask(request("ok")).status == 200
        streaming.send(request("held", stream=True))
        first = streaming.read_until(b"tok")
        waiting.send(request("held"))
        data = request("ok")
        uploading.send(data[:-5])
        wait_for(lambda: made.in_flight() == 2)
        (process,) = made.rig.processes
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not made.rig.board.get(0, WorkerCell.ACCEPTING))
        assert idle.closed()
        made.wall.release()
        rest = streaming.read_until(b"0\r\n\r\n")
        assert b"".join(stream_of("held")[2:4]) in (first + rest).replace(b"\r\n", b"") or b"[DONE]" in rest
        assert waiting.read().whole
        beat = made.rig.board.get(0, WorkerCell.HEARTBEAT_MS)
        wait_for(lambda: made.rig.board.get(0, WorkerCell.HEARTBEAT_MS) > beat + 200)  # it looked whether all is done
        uploading.send(data[-5:])
        assert uploading.read().status == 200, "a request that was coming is served"
        for client in (streaming, waiting, uploading):
            assert client.closed()
        assert process.wait(20) == 0
        made.wait_idle()


def test_sigterm_cuts_what_outlives_the_grace() -> None:
    with plane(grace_s=0.3) as made:
        made.wall.hold()
        with made.client() as client:
            client.send(request("held", stream=True))
            client.read_until(b"tok")
            (process,) = made.rig.processes
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
            while client.receive():
                pass
        wait_for(lambda: made.wall.seen[-1].gone_s > 0)
        made.wall.release()
