"""A rolling upgrade over REST: the processes of this machine are replaced by ones with the code on disk."""

import os
import signal

from fastapi import APIRouter

from fleetgate.control.api.errors import ApiError
from fleetgate.control.api.resources import ERRORS
from fleetgate.control.context import Control
from fleetgate.control.resources.config_file import check_file
from fleetgate.control.resources.schema import Part
from fleetgate.ipc.shared_memory import WorkerCell


class ReloadBegun(Part):
    """What is being replaced. Shape: the process ids of the workers that accepted when it began."""

    replaced_pids: list[int]


def routes(control: Control) -> APIRouter:
    """`/api/v1/reload`."""
    router = APIRouter(prefix="/api/v1", tags=["workers"], responses=ERRORS)

    @router.post(
        "/reload",
        operation_id="reload",
        status_code=202,
        summary="Replace all workers, then the control process, by ones with the code on disk; nothing is cut",
    )
    def reload() -> ReloadBegun:
        board = control.board
        if board is None or not control.config.supervised:
            raise ApiError(409, "this control process has no supervisor; it was not started by `fleetgate up`")
        if control.config.config_file:
            mistakes = check_file(control.config.config_file, control.data_dir.path)
            if mistakes:  # the new control process would read it, and go on without
                raise ApiError(422, "\n".join(["nothing was replaced, because the file has mistakes:", *mistakes]))
        accepting = [worker for worker in board.present() if board.get(worker, WorkerCell.ACCEPTING)]
        if not accepting:
            raise ApiError(409, "no worker serves: this machine is starting or stopping; try again when /readyz is 200")
        os.kill(os.getppid(), signal.SIGHUP)
        return ReloadBegun(replaced_pids=[board.get(worker, WorkerCell.PID) for worker in accepting])

    return router
