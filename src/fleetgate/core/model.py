"""The Snapshot and its parts: the immutable routing state that a proxy works from, replaced whole, never edited."""

from enum import StrEnum
from typing import Annotated

import msgspec

# Cells in shared memory are addressed by slot. The publisher assigns a slot once, and it survives a rename.
DEPLOYMENTS_MAX = 1024
ENDPOINTS_MAX = 4096
GATEWAYS_MAX = 256
# All slots in use (4,096 Endpoints) with 100,000 keys take about 30 MB; a larger file is damaged.
SNAPSHOT_BYTES_MAX = 64 * 1024 * 1024
DeploymentSlot = Annotated[int, msgspec.Meta(ge=0, lt=DEPLOYMENTS_MAX)]
EndpointSlot = Annotated[int, msgspec.Meta(ge=0, lt=ENDPOINTS_MAX)]
GatewaySlot = Annotated[int, msgspec.Meta(ge=0, lt=GATEWAYS_MAX)]


class Tier(StrEnum):
    """How a Deployment's GPUs are paid for."""

    COMMITTED = "committed"
    ELASTIC = "elastic"
    SPOT = "spot"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An address at which a ready replica (or an external Deployment) answers.

    Shape: `base_path` is the path part of the URL that an SDK gets, without a trailing slash: `/v1`.
    """

    slot: EndpointSlot
    scheme: str
    host: str
    port: int
    base_path: str
    engines: int = 1  # engines behind this address

    @property
    def origin(self) -> str:
        """`scheme://host:port`, the unit that credentials are bound to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class ProfileSource(StrEnum):
    """Where a Profile comes from, from most to least reliable."""

    WRITTEN = "written"  # the Deployment names it: calibrated, or written by the operator
    PEER = "peer"  # measured on another Deployment with the same model, SKU and engine
    GUESS = "guess"  # only the kind of engine is known; learned from its streams


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The measured capacity of one replica: a model on a SKU with one engine configuration.

    Units: one decode step takes `base_s + per_sequence_s × batch`; `concurrency` in requests at the goodput knee and
    `units` in CU, both per replica and 0 if they are to be derived; `kv_tokens` 0 if unknown.
    """

    name: str
    prefill_tokens_per_s: float
    base_s: float
    per_sequence_s: float
    batch_max: int = 256
    kv_tokens: int = 0
    concurrency: int = 0
    units: float = 0.0
    source: ProfileSource = ProfileSource.WRITTEN


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """The price of a Deployment: per hour for all of it, or per million tokens; None if not written."""

    usd_per_hour: float | None = None
    usd_per_mtok_input: float | None = None
    usd_per_mtok_output: float | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A model server to route to: models served, engine, location, Endpoints and capacity.

    Units: `concurrency_max` in requests for the whole Deployment, 0 without a limit; `units` in CU, 0 if they are to be
    learned.
    Shape: `models` maps the name that clients use to the name that the engine knows; `concurrency_written` says that an
    operator wrote the limit: then only refusals by the engine lower it.
    """

    slot: DeploymentSlot
    name: str
    region: str
    engine: str
    models: dict[str, str]
    endpoints: tuple[Endpoint, ...]
    cluster: str = ""  # empty if it runs on none
    labels: dict[str, str] = {}
    tier: Tier = Tier.COMMITTED
    paid_per_token: bool = False  # the price is per token, not per hour
    price: Price = Price()
    sku: str = ""  # of the accelerators, for reports and for Profiles shared by Deployments
    accelerators: int = 0  # of one replica; 0 if unknown
    profile: Profile | None = None
    concurrency_max: int = 0
    concurrency_written: bool = False
    units: float = 1.0
    credential: str = ""  # sealed for this Deployment's name; sent only to the origins of `endpoints`
    health_path: str = ""  # path of the readiness probe, empty for the engine's own
    egress_checked: bool = True  # False only for a Deployment from a --config file of the machine's operator


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """A Gateway's reference to a Deployment; a lower rank is filled first."""

    deployment: str
    rank: int


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests may wait for capacity, and for how long."""

    queue_max: int = 128
    queue_timeout_s: float = 30.0


class Resilience(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts, retries and timeouts before the client gets an error."""

    attempts_max: int = 3
    retry_budget: float = 0.1
    connect_timeout_s: float = 1.0
    resume: str = "auto"
    hedge: str = "off"


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Latency targets: time to first token by prompt size, and time per output token."""

    ttft_s: float = 2.0
    ttft_s_per_1k_tokens: float = 0.35
    tpot_s: float = 0.05


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """A user-defined rule on requests: its condition, and what it requires, prefers and sets.

    Shape: `when` and `require` are CEL, empty if not written; `prefer` names Deployments; `priority` is critical,
    standard, sheddable or empty; `python` names a policy of a plug-in.
    """

    name: str
    when: str = ""
    require: str = ""
    prefer: tuple[str, ...] = ()
    priority: str = ""
    python: str = ""


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """The user's object: reached at `<name>.<domain>`, it routes requests to its upstreams by a strategy."""

    slot: GatewaySlot
    name: str
    domain: str
    protocol: str
    strategy: str
    upstreams: tuple[Upstream, ...]
    default: bool = False
    overflow_at: float = 1.0
    locality: str = "prefer"  # "ignore": no preference for the proxy's own region
    tiers: str = "prefer"  # "ignore": no preference for supply paid by the hour over supply paid per token
    seconds_per_usd: float = 0.0  # the weight of a dollar in `least_cost`; with 0 the price only breaks ties
    admission: Admission = Admission()
    resilience: Resilience = Resilience()
    slo: Slo | None = None
    policies: tuple[Policy, ...] = ()

    @property
    def host(self) -> str:
        """The Host header that selects this Gateway, in lower case."""
        return f"{self.name}.{self.domain}".lower()


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A client API key as a proxy knows it: with an HMAC in place of the secret.

    Units: `expires_s` seconds since the epoch, 0 for never; `require_fresh_s` is how long it is valid without contact
    to the control plane, 0 for no bound of its own.
    Shape: `id` is the look-up part of the key; `secret_hmac` is hex; empty `gateways` or `models` allow all.
    `kill_streams` says that a revocation ends its running requests.
    """

    id: str
    name: str
    secret_hmac: str
    gateways: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    expires_s: float = 0.0
    kill_streams: bool = False
    require_fresh_s: float = 0.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a proxy needs to serve, at one version; a later version is always a complete new Snapshot.

    Shape: `emptied` says that all Gateways were deleted on purpose; an empty Snapshot without it is a fault.
    """

    version: int
    made_at_s: float
    gateways: tuple[Gateway, ...] = ()
    deployments: tuple[Deployment, ...] = ()
    keys: tuple[Key, ...] = ()
    egress_allow: tuple[str, ...] = ()  # CIDRs that Endpoints with `egress_checked` may resolve to
    emptied: bool = False


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Snapshot).decode


def same_routing(one: Snapshot, other: Snapshot) -> bool:
    """Whether two Snapshots differ only in keys, version and time."""
    return msgspec.structs.replace(one, version=other.version, made_at_s=other.made_at_s, keys=other.keys) == other


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """The bytes of a Snapshot file."""
    return _encode(snapshot)


def decode_snapshot(data: bytes) -> Snapshot:
    """Read a Snapshot file.

    Raises: `msgspec.ValidationError` or `msgspec.DecodeError` if the bytes are not a complete Snapshot.
    """
    try:
        return _decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"the Snapshot has a text that is not UTF-8: {error}") from None
    except RecursionError:
        raise msgspec.DecodeError("the Snapshot is nested too deeply") from None
