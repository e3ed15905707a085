"""The resources as operators write them: kinds, fields and defaults."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from fleetgate.control.resources import field_types as fields
from fleetgate.control.resources.field_types import BaseUrl, Labels, ModelName, Name, Region
from fleetgate.control.resources.policy_fields import POLICIES_MAX, STORED, Condition, PythonPolicyName, check_condition

Count = Annotated[int, Field(ge=0, le=1_000_000)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveAmount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TierName = Literal["committed", "elastic", "spot"]
ProviderName = Literal["kubernetes", "ssh", "skypilot", "local", "external"]
EngineName = Literal["vllm", "sglang", "llamacpp", "tgi", "tensorrt-llm", "openai"]
Share = Literal["prefer", "ignore"]
# No engine lies outside these bounds. They keep every figure that is derived from a Profile finite and above zero.
PREFILL_TOKENS_PER_S_MIN, PREFILL_TOKENS_PER_S_MAX = 0.01, 1e9
STEP_S_MAX = 60.0


class Part(BaseModel):
    """A part of a document. Unknown fields are refused, and no value is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


READ_ONLY = frozenset({"created_at", "updated_at", "id", "expires_at", "status"})


class Resource(Part):
    """The fields of every document.

    Shape: a given `generation` must equal the stored one (compare and swap), 0 for a resource that does not exist. The
    API returns the fields in `READ_ONLY` and ignores them in a request.
    """

    name: Name
    generation: Annotated[int | None, Field(ge=0)] = None
    created_at: str | None = None
    updated_at: str | None = None


class ClusterAccelerator(Part):
    """Accelerators that a Cluster has or can get."""

    sku: Annotated[str, Field(min_length=1, max_length=64)]
    count: Count = 1
    tier: TierName = "committed"
    usd_per_hour: Amount | None = None


class Cluster(Resource):
    """A place that can run replicas."""

    kind: Literal["Cluster"] = "Cluster"
    provider: ProviderName
    region: Region
    labels: Labels = {}
    accelerators: list[ClusterAccelerator] = []


class Model(Part):
    """A served model: the name that clients request, and the engine's own name if it differs."""

    name: ModelName
    upstream_name: ModelName | None = None


class Workload(Part):
    """The program that a managed Deployment's replicas run. `{port}` in command, args and env is the replica's port."""

    image: str | None = None
    command: fields.Command = []
    args: fields.Command = []
    env: fields.Environment = {}
    port: Annotated[int | None, Field(ge=1, le=65535)] = None
    health: fields.Path = "/health"


class CredentialRef(Part):
    """The Secret that is sent to the Deployment's own origins."""

    secret: Name


class Accelerator(Part):
    """The accelerators of one replica."""

    sku: Annotated[str, Field(min_length=1, max_length=64)]
    count: Count = 1


class Replicas(Part):
    """The number of replicas of each tier."""

    committed: Count = 1
    elastic_max: Count = 0
    spot_max: Count = 0


class Capacity(Part):
    """The capacity of the whole Deployment. Units: `concurrency` in simultaneous requests, `units` in CU."""

    concurrency: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    units: PositiveAmount | None = None


class DecodeStep(Part):
    """The duration of one decode step: `base_s + per_sequence_s × batch`."""

    base_s: Annotated[float, Field(gt=0, le=STEP_S_MAX)]
    per_sequence_s: Annotated[float, Field(ge=0, le=STEP_S_MAX)]


class Profile(Resource):
    """The measured capacity of one replica of a model on a SKU with one engine configuration.

    Units: `concurrency` in requests and `units` in CU at the goodput knee, both derived from the speeds if absent;
    `kv_tokens` is 0 if unknown.
    """

    kind: Literal["Profile"] = "Profile"
    model: ModelName
    sku: Annotated[str, Field(min_length=1, max_length=64)]
    accelerators_per_replica: Annotated[int, Field(ge=1, le=1_000_000)]
    engine: EngineName
    prefill_tokens_per_s: Annotated[float, Field(ge=PREFILL_TOKENS_PER_S_MIN, le=PREFILL_TOKENS_PER_S_MAX)]
    decode_step: DecodeStep
    batch_max: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    kv_tokens: Annotated[int, Field(ge=0, le=1_000_000_000_000)] = 0
    concurrency: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    units: Annotated[float | None, Field(gt=0, le=1_000_000)] = None


class Price(Part):
    """The price of an external Deployment: by the hour or by the token, not both."""

    usd_per_hour: Amount | None = None
    usd_per_mtok_input: Amount | None = None
    usd_per_mtok_output: Amount | None = None


class HealthProbe(Part):
    """How a Deployment's Endpoints are probed."""

    path: fields.Path = "/health"


class Deployment(Resource):
    """A model server to route to: external (`url`, `urls`) or managed (`workload`)."""

    kind: Literal["Deployment"] = "Deployment"
    cluster: Name | None = None
    region: Region | None = None
    labels: Labels | None = None
    models: Annotated[list[Model], Field(min_length=1)]
    engine: EngineName
    url: BaseUrl | None = None
    urls: Annotated[list[BaseUrl] | None, Field(min_length=1)] = None
    workload: Workload | None = None
    credential: CredentialRef | None = None
    accelerator: Accelerator | None = None
    replicas: Replicas = Replicas()
    capacity: Capacity = Capacity()
    profile: Name | None = None
    tier: TierName = "committed"
    price: Price | None = None
    health: HealthProbe | None = None
    status: dict[str, Any] | None = None

    def base_urls(self) -> tuple[str, ...]:
        """The base URLs of the external Endpoints as written; none for a managed Deployment."""
        return tuple(self.urls or ([self.url] if self.url else []))

    @property
    def engines(self) -> int:
        """The number of engines when all run: those behind `url`, one for each of `urls`, or the replicas."""
        return len(self.urls) if self.urls else max(1, self.replicas.committed)


class Upstream(Part):
    """A Deployment behind a Gateway; rank defaults to its position."""

    deployment: Name
    rank: Annotated[int | None, Field(ge=1, le=1_000_000)] = None


class Slo(Part):
    """The latency targets of a Gateway."""

    ttft_s: PositiveAmount = 2.0
    ttft_s_per_1k_tokens: Amount = 0.35
    tpot_s: PositiveAmount = 0.05


class Admission(Part):
    """The number of requests that may wait, and for how long."""

    queue_max: Count = 128
    queue_timeout_s: Amount = 30.0


class Resilience(Part):
    """How a Gateway handles failures: attempts, retries, timeouts, resume and hedging."""

    attempts_max: Annotated[int, Field(ge=1, le=100)] = 3
    retry_budget: Annotated[float, Field(ge=0, le=1)] = 0.1
    connect_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 1.0
    resume: Annotated[Literal["auto", "off"], BeforeValidator(fields.restore_off)] = "auto"
    hedge: Annotated[Literal["off", "critical", "all"], BeforeValidator(fields.restore_off)] = "off"


class PolicySet(Part):
    """The values that a policy sets on a request."""

    priority: Literal["critical", "standard", "sheddable"]


class Policy(Part):
    """A rule on requests: its condition and what it requires, prefers and sets. Expressions are CEL."""

    name: Name
    require: Condition | None = None
    prefer: Annotated[list[Name], Field(min_length=1)] | None = None
    set: PolicySet | None = None
    python: PythonPolicyName | None = None
    when: Condition | None = None

    @field_validator("when")
    @classmethod
    def _check_when(cls, when: str | None, info: ValidationInfo) -> str | None:
        """Only `require` is evaluated for each Deployment. The other effects hold for the request as a whole."""
        if (
            when is not None
            and info.context != STORED
            and any(info.data.get(field) is not None for field in ("prefer", "set", "python"))
        ):
            check_condition(when, without="deployment")
        return when

    @model_validator(mode="after")
    def _check_effect(self) -> Self:
        if self.require is None and self.prefer is None and self.set is None and self.python is None:
            fields.refuse_field(f"policy {self.name} does nothing", "add `require:`, `prefer:`, `set:` or `python:`")
        return self


class Gateway(Resource):
    """The address `<name>.<domain>` and how its requests are distributed over Deployments."""

    kind: Literal["Gateway"] = "Gateway"
    domain: fields.Domain
    protocol: fields.Protocol
    strategy: fields.StrategyName
    upstreams: Annotated[list[Upstream], Field(min_length=1)]
    default: bool = False
    overflow_at: Annotated[float, Field(gt=0, le=1)] = 1.0
    locality: Share = "prefer"
    tiers: Share = "prefer"
    seconds_per_usd: Amount = 0.0
    slo: Slo | None = None
    admission: Admission = Admission()
    resilience: Resilience = Resilience()
    policies: Annotated[list[Policy], Field(max_length=POLICIES_MAX)] = []

    @model_validator(mode="after")
    def _fill_ranks(self) -> Self:
        """The default of a rank is the upstream's position."""
        for position, upstream in enumerate(self.upstreams, start=1):
            if upstream.rank is None:
                upstream.rank = position
        return self


class Key(Resource):
    """A client API key: what it may use and when it expires. Its token is returned once, when it is created."""

    kind: Literal["Key"] = "Key"
    gateways: list[Name] = []
    models: list[ModelName] = []
    labels: Labels = {}
    expires: fields.Expires = ""
    kill_streams: bool = False
    require_fresh_s: Amount = 0.0
    id: str | None = None
    expires_at: str | None = None


class Secret(Resource):
    """A value that Fleetgate sends to Deployments and never returns."""

    kind: Literal["Secret"] = "Secret"
    value: Annotated[fields.SecretText, Field(json_schema_extra={"writeOnly": True})]


KINDS: dict[str, type[Resource]] = {
    "Cluster": Cluster,
    "Secret": Secret,
    "Profile": Profile,
    "Deployment": Deployment,
    "Gateway": Gateway,
    "Key": Key,
}
PLURALS = {f"{kind.lower()}s": kind for kind in KINDS}

# Fields of a later release. They are refused by name, so that a document cannot rely on them.
LATER_FIELDS = {
    ("Key", "rpm"): "request rate limits come in a later release",
    ("Key", "tpm"): "token rate limits come in a later release",
    ("Key", "concurrency"): "limits by key come in a later release",
    ("Key", "budget"): "budgets come in a later release",
}
LATER_KINDS = {
    "Policy": "policies are part of a Gateway, under `policies:`",
}
