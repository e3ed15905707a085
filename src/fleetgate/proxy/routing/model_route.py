"""The state of Gateways and their models in one worker: candidates, scheduler, queue, budgets, policies."""

from collections.abc import Collection, Mapping

import msgspec

from fleetgate.core.admission.request_queue import DrainRate
from fleetgate.core.admission.retry_budget import KeyBudget, RetryBudget
from fleetgate.core.exchange import Picked
from fleetgate.core.health.hedge_policy import HedgeThreshold
from fleetgate.core.model import Deployment, Gateway
from fleetgate.core.routing.prefix_affinity import PrefixAffinity
from fleetgate.core.routing.route import ModelRoute, RejectionReason
from fleetgate.core.routing.scheduler import Scheduler
from fleetgate.core.routing.strategies import Candidate
from fleetgate.policies.body_fields import BodyReader
from fleetgate.policies.policy_set import CompiledPolicies
from fleetgate.protocols import clients
from fleetgate.protocols.messages import ResumeMethod
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.telemetry.request_metrics import RequestMetrics
from fleetgate.proxy.transport.interface import ModelNames

ANY_ENGINE = frozenset({ResumeMethod.REPLAY, ResumeMethod.TOKENS})
ALL_METHODS = frozenset(ResumeMethod)
KEY_BUDGETS_MAX = 8192  # including revoked keys; beyond it all budgets are reset
TRIAL_WAIT_S = 1.0  # with every Endpoint ejected, a request waits this long for a trial's result. faults.md row 19


class TableParts(msgspec.Struct, frozen=True):
    """What a table gives to its routes. Shape: `table` identifies it; `deployments` are by slot."""

    table: object
    deployments: Mapping[int, DeploymentState]
    specs: tuple[Deployment, ...]
    made_s: float


class ModelRouteState:
    """One model in one Gateway, with what changes from request to request.

    Shape: `lead` is the Deployment that takes requests up to its limit without a decision, None if load must decide;
    `missing_models` says until when a Deployment (slot) is known not to serve the model at a path.
    """

    def __init__(self, model: str, route: ModelRoute, gateway: "GatewayState", parts: TableParts) -> None:
        self.table = parts.table
        self.by_slot = parts.deployments
        self.model = model
        self.model_json = msgspec.json.encode(model)
        self.same_name = ModelNames(self.model_json, self.model_json)
        self.log_names = b'"gateway":%b,"model":%b' % (msgspec.json.encode(gateway.spec.name), self.model_json)
        self.route = route
        self.gateway = gateway
        self.scheduler = Scheduler(gateway.spec, route)
        self.queue = self.scheduler.queue
        self.deployments = [parts.deployments[candidate.slot] for candidate in route.candidates]
        self.missing_models: dict[tuple[int, bytes], float] = {}
        self.hedges = gateway.spec.resilience.hedge != "off"
        self.may_lead = True
        self.lead: Candidate | None = None
        self.lead_picked = Picked(Candidate(name="", slot=-1))  # the event that the lead took a request
        self._update_lead()
        # With a single Endpoint there is no choice, so prompts are not remembered.
        self.has_choice = sum(len(deployment.endpoints) for deployment in self.deployments) > 1
        self.resumes = self.has_choice and gateway.spec.resilience.resume == "auto"
        self.hedge_threshold = HedgeThreshold()
        self.affinity = PrefixAffinity()
        self.drain_rate = DrainRate()
        self.metrics: dict[int, RequestMetrics] = {}

    def inherit(self, before: "ModelRouteState") -> None:
        """Copy what the same route of an older Snapshot has learned."""
        self.scheduler.turn = before.scheduler.turn
        self.drain_rate, self.affinity, self.hedge_threshold = (
            before.drain_rate,
            before.affinity,
            before.hedge_threshold,
        )

    def record_decisions(self) -> None:
        """Let the scheduler make and record every decision."""
        self.may_lead, self.lead = False, None
        self.scheduler.records_decisions = True

    def mark_model_missing(self, slot: int, path: bytes, until_s: float) -> None:
        """Note that a Deployment does not have this model, or this path."""
        self.missing_models[slot, path] = until_s
        self.lead = None  # without a lead the scheduler decides, which can exclude Deployments

    def slots_without_model(self, path: bytes, now_s: float) -> list[int]:
        """Deployments known not to serve this model at this path.

        Empty if excluding them would leave no candidate.
        """
        self.missing_models = {key: until_s for key, until_s in self.missing_models.items() if until_s > now_s}
        if not self.missing_models:
            self._update_lead()
        slots = [slot for slot, missing in self.missing_models if missing == path]
        return slots if len(slots) < len(self.route.candidates) else []

    def explain(self, reason: RejectionReason, tried: Collection[int], since_s: float, now_s: float) -> RejectionReason:
        """The reason why no Deployment can take a request that waits since `since_s`, with regard to ejected Endpoints.

        While an ejected Endpoint is on trial, requests wait shortly for its result.
        """
        if reason is RejectionReason.ALL_FULL:
            return reason
        after_s = now_s - TRIAL_WAIT_S
        for deployment in self.deployments if since_s > after_s else ():
            if deployment.slot in tried:
                continue
            if any(endpoint.trials and endpoint.trial_s > after_s for endpoint in deployment.endpoints):
                return RejectionReason.ON_TRIAL
        is_denied = reason is RejectionReason.NONE_UP and all(deployment.is_denied for deployment in self.deployments)
        return RejectionReason.DENIED if is_denied and self.deployments else reason

    def retry_after_s(self, now_s: float) -> float:
        """The time until the Retry-After of every healthy Deployment is over; 0 if one has none."""
        healthy = [deployment for deployment in self.deployments if deployment.health > 0.0]
        return max(0.0, min((deployment.retry_after_until_s - now_s for deployment in healthy), default=0.0))

    @property
    def resume_methods(self) -> frozenset[ResumeMethod]:
        """The methods by which responses of this route can be resumed."""
        return ALL_METHODS if any(deployment.resumes_prefill for deployment in self.deployments) else ANY_ENGINE

    def _update_lead(self) -> None:
        """Set the lead, unless a Profile, a policy or hedging requires a decision by the scheduler."""
        lead = self.route.lead
        if (
            lead is None
            or not self.may_lead
            or self.hedges
            or lead.overflow_at < 1.0
            or not self.gateway.policies.is_empty
            or self.by_slot[lead.slot].spec.profile is not None
        ):
            self.lead = None
        else:
            self.lead, self.lead_picked = lead, Picked(lead)


class GatewayState:
    """The state of a Gateway. Shape: `spec` is its Snapshot value; `routes` are by model."""

    def __init__(
        self, spec: Gateway, routes: Mapping[str, ModelRoute], before: "GatewayState | None", parts: TableParts
    ) -> None:
        self.spec = spec
        self.protocol = clients.find(spec.protocol)
        ratio = spec.resilience.retry_budget
        kept = before if before is not None and before.spec.resilience.retry_budget == ratio else None
        self.budget: RetryBudget = kept.budget if kept is not None else RetryBudget(ratio, parts.made_s)
        self._key_budgets: dict[str, KeyBudget] = kept._key_budgets if kept is not None else {}
        self._made_s = parts.made_s
        self.policies = CompiledPolicies.compile(spec, parts.specs)
        self.body_reader = BodyReader(self.policies.needs_body)
        self.routes = {model: ModelRouteState(model, route, self, parts) for model, route in routes.items()}

    def budget_of(self, key: str) -> KeyBudget:
        """The retry budget of one key."""
        known = self._key_budgets.get(key)
        if known is None:
            if len(self._key_budgets) >= KEY_BUDGETS_MAX:
                self._key_budgets.clear()
            own = RetryBudget(self.spec.resilience.retry_budget, self._made_s)
            known = self._key_budgets[key] = KeyBudget(self.budget, own)
        return known
