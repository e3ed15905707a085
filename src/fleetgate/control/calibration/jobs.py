"""Calibration jobs of the control process. A job writes its Profile at the end, or nothing."""

import asyncio
import re
import secrets
from typing import Any

import msgspec
import structlog

from fleetgate.control.calibration.client import CalibrationClient, CalibrationTarget, RequestFailed, dialable_address
from fleetgate.control.calibration.load_sweep import LoadSweep, SweepFindings, SweepProgress, TrafficDetected
from fleetgate.control.context import Control
from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.resources import schema as resources
from fleetgate.control.resources.apply import ChangeOrigin, GenerationConflict, parse_stored
from fleetgate.control.resources.egress import parse_ranges
from fleetgate.control.resources.problems import ResourceRefused, suggest
from fleetgate.control.snapshot import profiles
from fleetgate.control.snapshot.endpoint_status import endpoint_up
from fleetgate.control.store import repository as rows
from fleetgate.core import model
from fleetgate.core.capacity import calibration
from fleetgate.core.capacity.calibration import BudgetTooSmall, MeasurementFailed, SweepBudget, SweepRound, SweepTargets
from fleetgate.core.capacity.online_estimate import GUESS
from fleetgate.ipc.sealed_secret import UnsealFailed, unseal

ORIGIN = ChangeOrigin("by a calibration")
JOBS_KEPT = 32
UNKNOWN_SKU = "unknown"
NAME_CHARS_MAX = 63

log = structlog.get_logger()


class CalibrationOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a calibration. Shape: empty or None means the default."""

    model: str = ""
    profile: str = ""
    budget: SweepBudget = SweepBudget()
    tpot_s: float | None = None
    ttft_s: float | None = None
    force: bool = False
    use: bool = False


class CalibrationPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that a calibration sends and the documents that it changes."""

    deployment: model.Deployment
    model: str
    profile: str
    accelerator: resources.Accelerator
    generation: int
    document: dict[str, Any]
    engines: int
    targets: SweepTargets
    rounds: tuple[SweepRound, ...]

    @property
    def requests_max(self) -> int:
        """The maximum number of requests."""
        return sum(one.concurrency for one in self.rounds)

    @property
    def tokens_max(self) -> int:
        """The maximum number of prompt and output tokens."""
        return sum(one.tokens for one in self.rounds)

    @property
    def expected_s(self) -> float:
        """An estimate of the duration."""
        return calibration.expected_s(self.rounds, self.deployment.profile or GUESS, self.engines)


class CalibrationJob(msgspec.Struct, kw_only=True):
    """One calibration. Shape: `state` is running, done, failed or cancelled; `sentence` describes the end."""

    id: str
    plan: CalibrationPlan
    order: CalibrationOrder
    progress: SweepProgress = msgspec.field(default_factory=SweepProgress)
    state: str = "running"
    sentence: str = ""
    profile: dict[str, Any] | None = None
    saving: bool = False
    task: "asyncio.Task[None] | None" = None


class Calibrations:
    """The jobs of this process. The last `JOBS_KEPT` are kept in memory and are lost when the process ends."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._jobs: dict[str, CalibrationJob] = {}

    def of(self, deployment: str) -> list[CalibrationJob]:
        """The jobs of a Deployment, oldest first."""
        return [job for job in self._jobs.values() if job.plan.deployment.name == deployment]

    def get(self, deployment: str, job_id: str) -> CalibrationJob | None:
        """One job, or None if it does not exist."""
        job = self._jobs.get(job_id)
        return job if job is not None and job.plan.deployment.name == deployment else None

    async def plan(self, deployment: str, order: CalibrationOrder) -> CalibrationPlan | None:
        """Plan a calibration. The result is None for an unknown Deployment.

        Raises: `ResourceRefused`.
        """
        snapshot = self._control.publisher.current
        found = next((one for one in snapshot.deployments if one.name == deployment), None) if snapshot else None
        with self._control.database.read() as connection:
            stored = rows.load_resource(connection, "Deployment", deployment)
        if snapshot is None or found is None or stored is None:
            return None
        model_name = order.model or next(iter(found.models))
        if model_name not in found.models:
            raise ResourceRefused(
                f"Deployment {deployment} does not serve {model_name[:80]!r}; {suggest(model_name, found.models)}"
            )
        engines = found.endpoints[0].engines if found.endpoints else 1
        try:
            rounds = calibration.plan(order.budget, engines)
        except BudgetTooSmall as error:
            raise ResourceRefused(f"{error}; raise --max-requests and --max-tokens") from error
        plan = CalibrationPlan(
            deployment=found,
            model=model_name,
            profile=order.profile or profile_name(deployment, model_name),
            accelerator=_accelerator(stored),
            generation=stored.generation,
            document=stored.document,
            engines=engines,
            targets=_targets(snapshot, deployment, order),
            rounds=rounds,
        )
        # Check the documents with arbitrary figures first, so that an invalid Profile is refused before the sweep.
        trial = calibration.MeasuredProfile(prefill_tokens_per_s=1.0, base_s=1.0, per_sequence_s=1.0)
        await self._control.writer.check(_documents(plan, order, trial, 0), ORIGIN)
        return plan

    async def start(self, plan: CalibrationPlan, order: CalibrationOrder) -> CalibrationJob:
        """Start a job.

        Raises: `ResourceRefused`, also while the Deployment serves traffic or another calibration of it runs.
        """
        name = plan.deployment.name
        if any(job.state == "running" for job in self.of(name)):
            raise ResourceRefused(
                f"a calibration of Deployment {name} is already running; wait for it or cancel it", conflict=True
            )
        job = CalibrationJob(id=secrets.token_hex(6), plan=plan, order=order)
        self._jobs[job.id] = job  # before the first await, so that no second job starts meanwhile
        try:
            client = await self._open_client(plan, order)
        except BaseException:
            del self._jobs[job.id]
            raise
        job.task = asyncio.create_task(self._run(job, client))
        while len(self._jobs) > JOBS_KEPT and (old := next(iter(self._jobs.values()))).state != "running":
            del self._jobs[old.id]
        return job

    async def cancel(self, job: CalibrationJob) -> None:
        """Cancel a job and wait for its end. A job that already saves its Profile is not cancelled."""
        if job.task is None:
            return
        if not job.saving:
            job.task.cancel()
        await asyncio.gather(job.task, return_exceptions=True)

    async def _open_client(self, plan: CalibrationPlan, order: CalibrationOrder) -> CalibrationClient:
        """A client of the first Endpoint that is up. Raises: `ResourceRefused` if none is up or it serves traffic."""
        name, shared_memory = plan.deployment.name, self._control.shared_memory
        endpoint = next((one for one in plan.deployment.endpoints if endpoint_up(shared_memory, one.slot)), None)
        if endpoint is None:
            raise ResourceRefused(
                f"Deployment {name} has no ready Endpoint; see `fleetgate describe deployment {name}`", conflict=True
            )
        in_flight = self._in_flight(plan)
        if in_flight and not order.force:
            raise _busy(name, f"{in_flight} requests are in flight")
        target = CalibrationTarget(
            endpoint=endpoint,
            engine=plan.deployment.engine,
            upstream_model=plan.deployment.models[plan.model],
            credential=self._credential(plan.deployment),
            ranges=parse_ranges(self._control.config.egress_allow) if plan.deployment.egress_checked else None,
        )
        try:
            client = CalibrationClient(target, await dialable_address(target))
        except RequestFailed as error:
            raise ResourceRefused(f"Deployment {name} cannot be calibrated: {error}", conflict=True) from error
        load = await client.load()
        engine_requests = (load.running or 0) + (load.waiting or 0) if load is not None else 0
        if engine_requests and not order.force:
            await client.close()
            raise _busy(name, f"its engine has {engine_requests} requests")
        return client

    async def _run(self, job: CalibrationJob, client: CalibrationClient) -> None:
        plan, name = job.plan, job.plan.deployment.name
        traffic = None if job.order.force else lambda: self._in_flight(plan)
        sweep = LoadSweep(client, plan.engines, plan.targets, job.order.budget, traffic)
        job.progress = sweep.progress
        try:
            findings = await sweep.run(plan.rounds)
            job.saving = True
            await self._save(job, findings)
        except asyncio.CancelledError:
            self._end(job, "cancelled", f"The calibration of Deployment {name} was cancelled; nothing was written.")
            raise
        except (
            RequestFailed,
            TrafficDetected,
            MeasurementFailed,
            ResourceRefused,
            GenerationConflict,
            DataDirUnusable,
        ) as error:
            fix = "; wait until it is idle or use --force" if type(error) is TrafficDetected else ""
            text = f"The calibration of Deployment {name} stopped: {_reason(error)}{fix}. Nothing was written."
            self._end(job, "failed", text)
        except BaseException:
            text = f"The calibration of Deployment {name} stopped: internal error; search the log for "
            self._end(job, "failed", f"{text}`calibration_failed`. Nothing was written.")
            log.exception("calibration_failed", deployment=name)
            raise
        finally:
            await client.close()

    async def _save(self, job: CalibrationJob, findings: SweepFindings) -> None:
        """Write the Profile, and with `use` the Deployment that names it, in one transaction.

        Raises: as `ResourceWriter` does.
        """
        documents = _documents(job.plan, job.order, findings.measured, findings.kv_tokens)
        writer = self._control.writer
        checked = await writer.check(documents, ORIGIN)
        await asyncio.to_thread(writer.apply, checked, ORIGIN)
        await self._control.wait_adopted()
        job.profile = documents[0]
        self._end(job, "done", _summary(job, findings))

    def _end(self, job: CalibrationJob, state: str, sentence: str) -> None:
        job.state, job.sentence = state, sentence
        self._control.record("Deployment", job.plan.deployment.name, sentence)

    def _in_flight(self, plan: CalibrationPlan) -> int:
        shared_memory = self._control.shared_memory
        return shared_memory.in_flight_total(plan.deployment.slot) if shared_memory is not None else 0

    def _credential(self, deployment: model.Deployment) -> str:
        if not deployment.credential:
            return ""
        try:
            return unseal(deployment.credential, self._control.data_dir.seal_key, deployment.name)
        except UnsealFailed as error:
            raise ResourceRefused(f"{error}; apply the Secret again", conflict=True) from error


def profile_name(deployment: str, model_name: str) -> str:
    """The default name of a Profile."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{deployment}-{model_name}".lower())
    return slug[:NAME_CHARS_MAX].strip("-")


def _targets(snapshot: model.Snapshot, deployment: str, order: CalibrationOrder) -> SweepTargets:
    slos = [
        gateway.slo
        for gateway in snapshot.gateways
        if gateway.slo is not None and any(upstream.deployment == deployment for upstream in gateway.upstreams)
    ]
    tpot_s = order.tpot_s or profiles.strictest_tpot_s(snapshot.gateways, deployment)
    return SweepTargets(tpot_s, order.ttft_s or min((slo.ttft_s for slo in slos), default=model.Slo().ttft_s))


def _accelerator(stored: rows.StoredResource) -> resources.Accelerator:
    """The accelerator of one replica. A Profile of an unknown SKU can be named but fits no other Deployment."""
    match parse_stored(stored):
        case resources.Deployment(accelerator=resources.Accelerator() as accelerator):
            return accelerator
        case _:
            return resources.Accelerator(sku=UNKNOWN_SKU)


def _documents(
    plan: CalibrationPlan, order: CalibrationOrder, measured: calibration.MeasuredProfile, kv_tokens: int
) -> list[dict[str, Any]]:
    """The Profile, and with `use` the Deployment as it was at the start of the job, which now names the Profile."""
    profile: dict[str, Any] = {
        "kind": "Profile",
        "name": plan.profile,
        "model": plan.model,
        "sku": plan.accelerator.sku,
        "accelerators_per_replica": max(1, plan.accelerator.count),
        "engine": plan.deployment.engine,
        "prefill_tokens_per_s": _rounded(measured.prefill_tokens_per_s),
        "decode_step": {
            "base_s": _rounded(measured.base_s),
            "per_sequence_s": _rounded(measured.per_sequence_s),
        },
    }
    optional = {
        "batch_max": measured.batch_max,
        "kv_tokens": kv_tokens,
        "concurrency": measured.concurrency,
        "units": _rounded(measured.units),
    }
    profile |= {field: value for field, value in optional.items() if value}
    if not order.use:
        return [profile]
    return [profile, {**plan.document, "profile": plan.profile, "generation": plan.generation}]


def _summary(job: CalibrationJob, findings: SweepFindings) -> str:
    """The result as a sentence."""
    plan, found, progress = job.plan, findings.measured, job.progress
    replicas = " of one replica" if plan.engines > 1 else ""
    knee = (
        f"the knee is at {found.concurrency} requests at once and {found.units:.3g} CU"
        if found.concurrency
        else "the knee was not reached, so concurrency and units are derived from the speeds"
    )
    estimated = "; the engine reports no token counts, so they are estimates" if findings.estimated else ""
    hint = "; add `accelerator:` to the Deployment so that others can use the Profile"
    unknown = hint if plan.accelerator.sku == UNKNOWN_SKU else ""
    return (
        f"The calibration of Deployment {plan.deployment.name} wrote Profile {plan.profile}{replicas}: prefill "
        f"{found.prefill_tokens_per_s:,.0f} tokens/s, a decode step {found.base_s * 1e3:.3g} ms + "
        f"{found.per_sequence_s * 1e3:.3g} ms a sequence; {knee}; {progress.requests} requests and "
        f"{progress.tokens:,} tokens were sent until {findings.because}{estimated}{unknown}."
    )


def _reason(error: Exception) -> str:
    match error:
        case ResourceRefused(problems=(_, *_) as problems):
            return "; ".join(problem.sentence() for problem in problems)
        case _:
            return str(error)


def _rounded(value: float) -> float:
    """Round to four digits, since no such measurement is more precise."""
    return float(f"{value:.4g}")


def _busy(name: str, what: str) -> ResourceRefused:
    text = f"Deployment {name} serves traffic ({what}), which would distort the figures; wait or use --force"
    return ResourceRefused(text, conflict=True)
