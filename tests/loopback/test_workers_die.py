"""A worker killed in the middle: what it held is given back, who waits to be accepted is not reset."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from fleetgate.core.model import Admission
from fleetgate.ipc.shared_memory import WorkerCell
from tests.loopback.rig import Rig
from tests.loopback.wall import Wall
from tests.loopback.wall_client import request
from tests.loopback.wall_replies import answer as answer_of
from tests.loopback.wall_rig import Plane
from tests.loopback.wall_supervisor import Plan
from tests.waiting import wait_for


class Supervised(Rig):
    """The workers are the children of a real supervisor."""

    def __enter__(self) -> "Supervised":
        workers = [self.config(index) for index in range(self.board.workers)]
        plan = Plan(self.board_fd, 5.0, self.fds, workers)
        env = {**os.environ, "FLEETGATE_TEST_PLAN": msgspec.json.encode(plan).decode()}
        argv = [sys.executable, "-m", "tests.loopback.wall_supervisor"]
        self.processes.append(subprocess.Popen(argv, env=env, pass_fds=self.fds))
        return self

    def pid(self, worker: int) -> int:
        return self.board.get(worker, WorkerCell.PID)


@contextmanager
def supervised(workers: int) -> Iterator[tuple[Plane, Supervised]]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="fleetgate-test-")))
        wall = stack.enter_context(Wall())
        rig = stack.enter_context(Supervised(directory, workers))
        made = Plane(rig, [wall])
        made.use({"concurrency_max": 8})
        yield made, rig


def test_a_killed_worker_gives_back_what_it_held_and_comes_again() -> None:
    with supervised(2) as (made, rig):
        made.wall.hold()
        clients = [made.client() for _ in range(8)]
        for number, client in enumerate(clients):
            client.send(request("held", stream=number % 2 == 0))
        wait_for(lambda: made.in_flight() == 8)
        slot = made.slots[0]
        victim = 0 if rig.board.in_flight[slot * 2] else 1
        held, kept = rig.board.in_flight[slot * 2 + victim], rig.board.in_flight[slot * 2 + 1 - victim]
        assert held + kept == 8
        starts, version = rig.board.get(victim, WorkerCell.STARTS), rig.version
        os.kill(rig.pid(victim), signal.SIGKILL)
        wait_for(lambda: made.in_flight() == kept)
        wait_for(lambda: len([seen for seen in made.wall.seen if seen.gone_s]) == held)
        wait_for(lambda: rig.board.get(victim, WorkerCell.STARTS) == starts + 1)
        wait_for(lambda: bool(rig.board.get(victim, WorkerCell.ACCEPTING)))
        assert rig.board.get(victim, WorkerCell.SNAPSHOT_VERSION) == version
        made.wall.release()
        answers = 0
        for client in clients:
            with client:
                try:
                    answers += client.read().whole
                except AssertionError:
                    assert client.ended  # it was with the dead worker
        assert answers == kept
        assert all(made.ask(request("ok")).body == answer_of("ok") for _ in range(20))
        made.wait_idle()


def test_room_that_a_dead_worker_held_goes_to_those_who_wait() -> None:
    with supervised(2) as (made, rig):
        made.use({"concurrency_max": 2}, admission=Admission(queue_max=50, queue_timeout_s=60))
        made.wall.hold()
        holders = [made.client() for _ in range(2)]
        for client in holders:
            client.send(request("held"))
        wait_for(lambda: made.in_flight() == 2)
        slot = made.slots[0]
        victim = 0 if rig.board.in_flight[slot * 2] else 1
        waiters = [made.client() for _ in range(12)]
        for client in waiters:
            client.send(request("ok"))
        wait_for(lambda: rig.board.waiting_total(0) == 12)
        survivor_waits = rig.board.get(1 - victim, WorkerCell.WAITING)
        os.kill(rig.pid(victim), signal.SIGKILL)
        served = 0
        for client in waiters:
            with client:
                try:
                    served += client.read().status == 200
                except AssertionError:
                    assert client.ended
        assert served == survivor_waits
        made.wall.release()
        for client in holders:
            client.socket.close()
        made.wait_idle()


def test_connections_in_the_backlog_survive_their_worker() -> None:
    with supervised(1) as (made, rig):
        pid = rig.pid(0)
        os.kill(pid, signal.SIGSTOP)
        clients = [made.client() for _ in range(20)]
        for client in clients:
            client.send(request("ok"))
        os.kill(pid, signal.SIGKILL)
        for client in clients:
            with client:
                assert client.read().body == answer_of("ok")
        assert rig.pid(0) != pid
        made.wait_idle()


def test_a_supervisor_that_is_stopped_drains_its_workers() -> None:
    with supervised(2) as (made, rig):
        made.wall.hold()
        clients = [made.client() for _ in range(6)]
        for client in clients:
            client.send(request("held"))
        wait_for(lambda: made.in_flight() == 6)
        (supervisor,) = rig.processes
        supervisor.terminate()
        wait_for(lambda: not any(rig.board.get(w, WorkerCell.ACCEPTING) for w in range(2)))
        made.wall.release()
        for client in clients:
            with client:
                assert client.read().status == 200
        assert supervisor.wait(20) == 0
        made.wait_idle()


def test_workers_do_not_outlive_a_killed_supervisor() -> None:
    """The life pipe: its write end is the supervisor's alone."""
    read_end, write_end = os.pipe()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="fleetgate-test-")))
        rig = stack.enter_context(Rig(directory, 1, life_fd=read_end))
        rig.publish()
        rig.wait_until_used()
        os.close(write_end)
        assert rig.processes[0].wait(20) == 0
    os.close(read_end)


def test_row_74_a_worker_that_stands_still_for_good_is_replaced() -> None:
    """Until then it holds up whoever the kernel gives to it, and nothing else would end that."""
    with supervised(2) as (made, rig):
        before = rig.pid(0)
        os.kill(before, signal.SIGSTOP)
        wait_for(lambda: rig.pid(0) not in (0, before))
        rig.wait_until_used()
        assert [made.ask(request("ok")).status for _ in range(12)] == [200] * 12
