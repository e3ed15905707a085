"""A supervisor over real workers, in a process of its own: its signal handlers belong to a main thread."""

import os
import sys

import msgspec

from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.proxy.worker.config import ENV, WorkerConfig
from fleetgate.supervisor.child_process import ChildProcess, python_child
from fleetgate.supervisor.supervisor import Supervisor, write_log
from tests.loopback.rig import mapped


class Plan(msgspec.Struct):
    """What to run. Shape: `fds` are all descriptors that the workers inherit."""

    board_fd: int
    grace_s: float
    fds: list[int]
    workers: list[WorkerConfig]


def children_of(plan: Plan) -> list[ChildProcess]:
    """One child for each worker."""
    children = []
    for config in plan.workers:
        argv, env = python_child("fleetgate.proxy.worker", ENV, msgspec.json.encode(config))
        children.append(
            ChildProcess(name=f"worker {config.index}", argv=argv, env=env, fds=list(plan.fds), worker=config.index)
        )
    return children


def main() -> int:
    """Run the plan that the environment holds."""
    plan = msgspec.json.decode(os.environ["FLEETGATE_TEST_PLAN"], type=Plan)
    board: SharedMemory = mapped(plan.board_fd, len(plan.workers))
    return Supervisor(children_of(plan), board, plan.grace_s, write_log).run()


if __name__ == "__main__":
    sys.exit(main())
