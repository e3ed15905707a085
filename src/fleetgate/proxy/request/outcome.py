"""Records of requests: metrics, the access log, the decision log, and what is learned from responses."""

import time
from typing import Protocol

import msgspec

from fleetgate.core.capacity.token_estimates import TokenEstimates
from fleetgate.core.exchange import Failure, Outcome
from fleetgate.core.routing.decision_record import RecordedEnd, RequestIdentity
from fleetgate.ipc.log import Level
from fleetgate.proxy.request.attempt import Attempt
from fleetgate.proxy.request.request_context import FinalResponse, ReceivedRequest
from fleetgate.proxy.request.reservation import PlacementRequest, Reservation
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.model_route import ModelRouteState
from fleetgate.proxy.telemetry.access_log import NO_DEPLOYMENT, OUTCOME_BYTES, REQUEST_LINE, AccessLog
from fleetgate.proxy.telemetry.decision_log import DecisionLog
from fleetgate.proxy.telemetry.metrics import WorkerMetrics
from fleetgate.proxy.telemetry.request_metrics import RequestMetrics, RequestMetricsCache, TokenEstimateError
from fleetgate.proxy.transport.interface import UpstreamResponse

UNREACHABLE_LINE_EVERY_S = 5.0  # between lines about an unreachable Deployment
_OK = Outcome.OK


class Journal(Protocol):
    """The usage journal, as records use it."""

    def add(self, line: bytes) -> None:
        """Append one line."""


class RequestSummary(msgspec.Struct):
    """A request that has ended. Units: `*_s` on the worker's clock; `first_s` is 0 without content."""

    id: bytes
    received: ReceivedRequest
    route: ModelRouteState
    outcome: Outcome
    status: int
    attempts: int
    resumes: int
    written_bytes: int
    started_s: float
    first_s: float
    ended_s: float
    attempt: Attempt | None
    placement_request: PlacementRequest | None


class OutcomeRecorder:
    """Records the requests of one worker."""

    def __init__(
        self,
        metrics: WorkerMetrics,
        access_log: AccessLog,
        decisions: DecisionLog | None,
        journal: Journal,
        estimates: TokenEstimates,
        cache: RequestMetricsCache,
    ) -> None:
        self._metrics = metrics
        self._access_log = access_log
        self._decisions = decisions
        self.journal_add = journal.add
        self._cache = cache
        self._estimate_errors = {kind: TokenEstimateError(metrics, kind) for kind in ("prompt", "output")}
        self._unreachable_logged_s: dict[str, float] = {}
        self.estimates = estimates

    def attempt_failed(self, route: ModelRouteState, deployment: DeploymentState, failure: Failure) -> None:
        """Count an attempt that was lost."""
        metrics = route.metrics.get(deployment.slot)
        if metrics is not None:
            self._metrics.cells[metrics.failure(failure)] += 1

    def not_connected(self, deployment: DeploymentState, reason: str, now_s: float) -> None:
        """Log why a Deployment cannot be reached, at most every 5 s."""
        name = deployment.spec.name
        if now_s - self._unreachable_logged_s.get(name, float("-inf")) >= UNREACHABLE_LINE_EVERY_S:
            self._unreachable_logged_s[name] = now_s
            self._access_log.event(Level.WARNING, "upstream_trouble", reason[:300], deployment=name)

    def resumed(self, route: ModelRouteState, method: str) -> None:
        """Count a response that another Deployment resumes."""
        self._metrics.add("fleetgate_resumes_total", {"gateway": route.gateway.spec.name, "way": method})

    def learn(
        self,
        received: ReceivedRequest,
        route: ModelRouteState,
        placement_request: PlacementRequest | None,
        reservation: Reservation,
        response: UpstreamResponse,
        now_s: float,
    ) -> None:
        """Learn token counts and speed from a response that ended well."""
        model, usage = route.model, response.usage
        prompt_tokens = 0
        output_tokens = response.event_count if response.stream else 0
        if usage is not None:
            prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
            output_tokens = usage.completion_tokens or usage.output_tokens or output_tokens
            self.estimates.record_prompt(model, len(received.body), prompt_tokens)
            if placement_request is not None:
                self._estimate_errors["prompt"].record(placement_request.shape.prompt_tokens, prompt_tokens)
                self._estimate_errors["output"].record(placement_request.shape.output_tokens, output_tokens)
        if output_tokens:
            self.estimates.record_output(model, received.context.key.name, output_tokens)
        if placement_request is not None:
            shape = placement_request.shape
            reservation.measured(prompt_tokens or shape.prompt_tokens, output_tokens or shape.output_tokens, now_s)
        reservation.ended(output_tokens if response.stream else 0, route.scheduler.slo.tpot_s, now_s)

    def record(self, request: RequestSummary) -> None:
        """Count and log a request that has ended."""
        if self._decisions is not None:
            self._record_decision(self._decisions, request)
        cells = self._metrics.cells
        attempt, route, outcome = request.attempt, request.route, request.outcome
        deployment = attempt.deployment if attempt is not None else None
        response = attempt.response if attempt is not None else None
        first_s, ended_s = request.first_s, request.ended_s
        metrics = route.metrics.get(deployment.slot) if deployment is not None else None
        if metrics is None:
            metrics = self._other_metrics(route, deployment)
        cells[metrics.outcomes.get(outcome) or metrics.outcome(outcome)] += 1
        if request.status == 503:
            self._metrics.add("fleetgate_unavailable_total", {"gateway": route.gateway.spec.name})
        if first_s:
            metrics.ttft.observe(first_s - request.started_s)
            metrics.duration.observe(ended_s - request.started_s)
        prompt_tokens = output_tokens = 0
        if response is not None:
            if response.stream and response.event_count > 1:
                tpot_s = (ended_s - first_s) / (response.event_count - 1)
                metrics.tpot.observe(tpot_s)
                if outcome is _OK and deployment is not None and not request.resumes:
                    deployment.timing.record_stream(tpot_s)
            usage = response.usage
            if usage is not None:
                prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
                output_tokens = usage.completion_tokens or usage.output_tokens or 0
                if outcome is _OK and output_tokens and not response.stream and attempt is not None:
                    attempt.deployment.timing.record_response((ended_s - attempt.sent_s) / output_tokens)
                cells[metrics.prompt_tokens] += prompt_tokens
                cells[metrics.output_tokens] += output_tokens
        if self._access_log.on:
            started_s = request.started_s
            self._access_log.add(
                REQUEST_LINE
                % (
                    int(time.time() * 1000),
                    request.id,
                    route.log_names,
                    request.received.context.key_json,
                    deployment.log_names if deployment is not None else NO_DEPLOYMENT,
                    request.status,
                    OUTCOME_BYTES[outcome],
                    request.attempts,
                    b"true" if request.received.info.stream else b"false",
                    int((first_s - started_s) * 1e6) if first_s else 0,
                    int((ended_s - started_s) * 1e6),
                    request.written_bytes,
                    prompt_tokens,
                    output_tokens,
                )
            )

    def _other_metrics(self, route: ModelRouteState, deployment: DeploymentState | None) -> RequestMetrics:
        """The metrics for requests of this route without a response from a Deployment."""
        if deployment is None:
            return self._cache.get(route.gateway.spec.name, "", "")
        return self._cache.get(route.gateway.spec.name, deployment.spec.name, deployment.spec.region)

    def _record_decision(self, decisions: DecisionLog, request: RequestSummary) -> None:
        shape = request.placement_request.shape if request.placement_request is not None else None
        if shape is None:
            return  # no Deployment was chosen for it
        response = request.attempt.response if request.attempt is not None else None
        usage = response.usage if response is not None else None
        prompt_tokens: float = 0
        output_tokens: float = response.event_count if response is not None and response.stream else 0
        if usage is not None:
            prompt_tokens = usage.prompt_tokens or usage.input_tokens or 0
            output_tokens = usage.completion_tokens or usage.output_tokens or output_tokens
        identity = identity_of(decisions, request.id, request.received, request.route)
        end = RecordedEnd(
            **identity._asdict(),
            outcome=request.outcome.value,
            duration_s=request.ended_s - request.started_s,
            ttft_s=request.first_s - request.started_s if request.first_s else 0.0,
            prompt_tokens=prompt_tokens or shape.prompt_tokens,
            output_tokens=output_tokens or shape.output_tokens,
            estimated=not (prompt_tokens and output_tokens),
            deployment=request.attempt.deployment.spec.name if request.attempt is not None else "",
        )
        decisions.ended(end)


def identity_of(
    decisions: DecisionLog, request_id: bytes, received: ReceivedRequest, route: ModelRouteState
) -> RequestIdentity:
    """The names of a request in a record."""
    gateway, key = route.gateway.spec.name, received.context.key.name
    return decisions.identity(request_id, gateway, route.model, key)


def final_response(attempt: Attempt | None, outcome: Outcome, size_bytes: int) -> FinalResponse:
    """The end of a response, for the idempotency store."""
    response = attempt.response if attempt is not None else None
    if outcome is not _OK or attempt is None or response is None:
        return FinalResponse(False, False, size_bytes, b"", None)
    headers = response.passed + attempt.deployment.response_headers
    return FinalResponse(True, response.stream, size_bytes, headers, None if response.stream else response.held[0])
