"""Calibrations of a Deployment over REST: plan, start, read and cancel."""

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import Field

from fleetgate.control.api.errors import ApiError
from fleetgate.control.api.resources import ERRORS
from fleetgate.control.calibration.jobs import CalibrationJob, CalibrationOrder, CalibrationPlan, Calibrations
from fleetgate.control.resources.field_types import Name
from fleetgate.control.resources.schema import Part
from fleetgate.core.capacity.calibration import SweepBudget

_DEFAULT = SweepBudget()
Seconds = Annotated[float, Field(gt=0, le=3600)]


class CalibrationRequest(Part):
    """A calibration to start.

    Units: `requests_max` and `tokens_max` limit what is sent; `tpot_s` and `ttft_s` are the targets of the responses.
    """

    model: Annotated[str, Field(max_length=256)] = ""
    profile: Name | None = None
    requests_max: Annotated[int, Field(ge=1, le=1_000_000)] = _DEFAULT.requests_max
    tokens_max: Annotated[int, Field(ge=1, le=1_000_000_000)] = _DEFAULT.tokens_max
    tpot_s: Seconds | None = None
    ttft_s: Seconds | None = None
    dry_run: bool = False
    force: bool = False
    use: bool = False


class RoundShown(Part):
    """A round of requests that start together."""

    measures: str
    at_once: int
    prompt_tokens: int
    output_tokens: int


class PlanShown(Part):
    """The most that a calibration would send. Units: `expected_s` is an estimate of its duration."""

    deployment: str
    model: str
    profile: str
    tpot_s: float
    ttft_s: float
    requests_max: int
    tokens_max: int
    expected_s: float
    rounds: list[RoundShown]


class CalibrationShown(Part):
    """A calibration. Shape: `state` is running, done, failed or cancelled; `profile` is the written Profile, if any."""

    id: str
    deployment: str
    state: str
    step: str
    share: float
    requests: int
    tokens: int
    requests_max: int
    tokens_max: int
    sentence: str
    profile: dict[str, Any] | None


class CalibrationList(Part):
    """Calibrations, oldest first."""

    items: list[CalibrationShown]


def routes(calibrations: Calibrations) -> APIRouter:
    """`/api/v1/deployments/{name}/calibrations`."""
    router = APIRouter(prefix="/api/v1/deployments/{name}/calibrations", tags=["deployments"], responses=ERRORS)

    @router.post(
        "",
        operation_id="calibrate_deployment",
        summary="Measure the capacity of a replica and write a Profile; `dry_run` only returns the plan",
        response_model=PlanShown,
        responses={202: {"model": CalibrationShown}},
    )
    async def create(name: str, body: CalibrationRequest) -> JSONResponse:
        order = CalibrationOrder(
            model=body.model,
            profile=body.profile or "",
            budget=SweepBudget(body.requests_max, body.tokens_max),
            tpot_s=body.tpot_s,
            ttft_s=body.ttft_s,
            force=body.force,
            use=body.use,
        )
        plan = await calibrations.plan(name, order)
        if plan is None:
            raise _not_found(name)
        if body.dry_run:
            return JSONResponse(_plan_view(plan).model_dump())
        return JSONResponse(_job_view(await calibrations.start(plan, order)).model_dump(), 202)

    @router.get("", operation_id="list_calibrations", summary="Calibrations since the start of the control process")
    def list_all(name: str) -> CalibrationList:
        return CalibrationList(items=[_job_view(job) for job in calibrations.of(name)])

    @router.get("/{id}", operation_id="get_calibration", summary="One calibration: its progress or its result")
    def get(name: str, id: str) -> CalibrationShown:
        return _job_view(_find_job(calibrations, name, id))

    @router.delete("/{id}", operation_id="cancel_calibration", summary="Cancel a calibration that has not ended")
    async def cancel(name: str, id: str) -> CalibrationShown:
        job = _find_job(calibrations, name, id)
        await calibrations.cancel(job)
        return _job_view(job)

    return router


def _find_job(calibrations: Calibrations, name: str, job_id: str) -> CalibrationJob:
    job = calibrations.get(name, job_id)
    if job is None:
        raise ApiError(
            404,
            f"Deployment {name[:63]!r} has no calibration {job_id[:32]!r}; start a new one: a restart of the control "
            "process ends all calibrations, and an unfinished one writes nothing",
        )
    return job


def _plan_view(plan: CalibrationPlan) -> PlanShown:
    return PlanShown(
        deployment=plan.deployment.name,
        model=plan.model,
        profile=plan.profile,
        tpot_s=plan.targets.tpot_s,
        ttft_s=plan.targets.ttft_s,
        requests_max=plan.requests_max,
        tokens_max=plan.tokens_max,
        expected_s=round(plan.expected_s, 1),
        rounds=[
            RoundShown(
                measures=one.measures,
                at_once=one.concurrency,
                prompt_tokens=one.prompt_tokens,
                output_tokens=one.output_tokens,
            )
            for one in plan.rounds
        ],
    )


def _job_view(job: CalibrationJob) -> CalibrationShown:
    return CalibrationShown(
        id=job.id,
        deployment=job.plan.deployment.name,
        state=job.state,
        step=job.progress.step,
        share=job.progress.share,
        requests=job.progress.requests,
        tokens=job.progress.tokens,
        requests_max=job.plan.requests_max,
        tokens_max=job.plan.tokens_max,
        sentence=job.sentence,
        profile=job.profile,
    )


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"there is no Deployment {name[:63]!r}; list them with GET /api/v1/deployments")
