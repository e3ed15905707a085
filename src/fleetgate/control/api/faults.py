"""Injected faults over REST: start one, list the active ones, end one."""

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field

from fleetgate.control.api.errors import ApiError
from fleetgate.control.api.resources import ERRORS
from fleetgate.control.api.views import rfc3339
from fleetgate.control.context import Control
from fleetgate.control.faults import FaultExists, FaultService, new_name
from fleetgate.control.resources.field_types import Name
from fleetgate.control.resources.schema import Part
from fleetgate.core.fault_injection import DURATION_S_MAX, Fault, FaultKind

ADOPTED_S = 0.15  # workers read the file of faults ten times a second


class FaultRequest(Part):
    """A fault to inject.

    Units: `share` of the Deployment's requests, 0 to 1; `stop_below_slo` is the share of requests inside the SLO below
    which the fault ends by itself, 0 for no such limit.
    """

    kind: Literal["delay", "error", "cut", "stall", "refuse"]
    deployment: Name
    name: Name | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    for_s: Annotated[float, Field(gt=0, le=DURATION_S_MAX)] = 60.0
    stop_below_slo: Annotated[float, Field(ge=0, le=1)] = 0.9
    delay_s: Annotated[float, Field(gt=0, le=600)] = 2.0
    status: Annotated[int, Field(ge=400, le=599)] = 503


class FaultShown(Part):
    """An active fault. Units: `left_s` is the time that remains; `struck` counts the affected requests so far."""

    kind: str
    name: str
    deployment: str
    share: float
    stop_below_slo: float
    delay_s: float | None
    status: int | None
    begins_at: str
    ends_at: str
    left_s: float
    struck: int


class FaultList(Part):
    """The active faults, oldest first."""

    items: list[FaultShown]


def routes(control: Control, faults: FaultService) -> APIRouter:
    """`/api/v1/faults`."""
    router = APIRouter(prefix="/api/v1/faults", tags=["faults"], responses=ERRORS)

    @router.post(
        "", operation_id="inject_fault", status_code=201, summary="Make a share of the requests to a Deployment fail"
    )
    async def create(body: FaultRequest) -> FaultShown:
        snapshot = control.publisher.current
        if not any(one.name == body.deployment for one in (snapshot.deployments if snapshot else ())):
            raise ApiError(404, f"there is no Deployment {body.deployment!r}; list them with GET /api/v1/deployments")
        now_s = time.time()
        fault = Fault(
            name=body.name or new_name(body.kind),
            kind=FaultKind(body.kind),
            deployment=body.deployment,
            share=body.share,
            begins_s=now_s,
            ends_s=now_s + body.for_s,
            stop_below_slo=body.stop_below_slo,
            delay_s=body.delay_s,
            status=body.status,
        )
        try:
            await asyncio.to_thread(faults.begin, fault)
        except FaultExists:
            raise ApiError(409, f"a fault {fault.name!r} is active; end it first, or give another name") from None
        await asyncio.sleep(ADOPTED_S)
        return _view(fault, faults)

    @router.get("", operation_id="list_faults", summary="The active faults")
    def list_all() -> FaultList:
        return FaultList(items=[_view(fault, faults) for fault in faults.all()])

    @router.get("/{name}", operation_id="get_fault", summary="One active fault")
    def get(name: str) -> FaultShown:
        found = next((fault for fault in faults.all() if fault.name == name), None)
        if found is None:
            raise _not_found(name)
        return _view(found, faults)

    @router.delete("/{name}", operation_id="end_fault", summary="End a fault now")
    async def end(name: str) -> FaultShown:
        fault = await asyncio.to_thread(faults.end, name, "it was ended through the API")
        if fault is None:
            raise _not_found(name)
        await asyncio.sleep(ADOPTED_S)
        return _view(fault, faults)

    return router


def _view(fault: Fault, faults: FaultService) -> FaultShown:
    return FaultShown(
        kind=fault.kind.value,
        name=fault.name,
        deployment=fault.deployment,
        share=fault.share,
        stop_below_slo=fault.stop_below_slo,
        delay_s=fault.delay_s if fault.kind is FaultKind.DELAY else None,
        status=fault.status if fault.kind is FaultKind.ERROR else None,
        begins_at=rfc3339(fault.begins_s),
        ends_at=rfc3339(fault.ends_s),
        left_s=round(max(0.0, fault.ends_s - time.time()), 1),
        struck=faults.struck_requests(fault.name),
    )


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"no fault {name[:63]!r} is active; list the active faults with GET /api/v1/faults")
