"""A rolling upgrade over REST: processes with the code on disk replace the processes of this machine."""

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
    """A rolling upgrade. Shape: `replaced_pids` are the process ids of the workers that accepted when it began."""

    replaced_pids: list[int]


def routes(control: Control) -> APIRouter:
    """`/api/v1/reload`."""
    router = APIRouter(prefix="/api/v1", tags=["workers"], responses=ERRORS)

    @router.post(
        "/reload",
        operation_id="reload",
        status_code=202,
        summary="Replace all workers, then the control process, by processes with the code on disk; no request is lost",
    )
    def reload() -> ReloadBegun:
        shared_memory = control.shared_memory
        if shared_memory is None or not control.config.supervised:
            raise ApiError(409, "this control process has no supervisor; start Fleetgate with `fleetgate up`")
        if control.config.config_file:
            mistakes = check_file(control.config.config_file, control.data_dir.path)
            if mistakes:  # the new control process would read the file and continue without it
                raise ApiError(422, "\n".join(["nothing was replaced, because the file has mistakes:", *mistakes]))
        accepting = [worker for worker in shared_memory.present() if shared_memory.get(worker, WorkerCell.ACCEPTING)]
        if not accepting:
            text = "no worker accepts requests: this machine starts or stops; try again when /readyz returns 200"
            raise ApiError(409, text)
        os.kill(os.getppid(), signal.SIGHUP)
        return ReloadBegun(replaced_pids=[shared_memory.get(worker, WorkerCell.PID) for worker in accepting])

    return router
