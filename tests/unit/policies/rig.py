"""Two Deployments, a Gateway over them, and helpers that build policies."""

from itertools import count

from fleetgate.core.model import Deployment, Gateway, Key, Policy, Price, Tier, Upstream
from fleetgate.policies.policy_set import CompiledPolicies

LABELLED = Deployment(
    slot=0,
    name="labelled",
    region="eu-west",
    engine="vllm",
    models={"m": "m", "n": "n"},
    endpoints=(),
    cluster="c",
    labels={"jurisdiction": "eu", "zone": "z"},
    tier=Tier.SPOT,
    sku="H100-80GB",
    accelerators=8,
    price=Price(usd_per_hour=2.5),
)
BARE = Deployment(slot=1, name="bare", region="us-east", engine="openai", models={"m": "m"}, endpoints=())
NOT_UPSTREAM = Deployment(slot=2, name="not-upstream", region="eu-west", engine="vllm", models={"m": "m"}, endpoints=())


def policy(**fields: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """The fields of a policy; `policies` adds a name."""
    return fields


def policies(*fields_of_each: dict[str, str | tuple[str, ...]]) -> CompiledPolicies:
    """Policies over both Deployments."""
    return compiled(*(named(number, fields) for number, fields in zip(count(), fields_of_each, strict=False)))


def named(number: int, fields: dict[str, str | tuple[str, ...]]) -> Policy:
    """One policy; its default name is p and its number."""
    return Policy(**{"name": f"p{number}", **fields})  # type: ignore[arg-type]


def compiled(*of_gateway: Policy) -> CompiledPolicies:
    """Policies over both Deployments."""
    gateway = Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy="overflow",
        upstreams=(Upstream(deployment="labelled", rank=1), Upstream(deployment="bare", rank=2)),
        policies=of_gateway,
    )
    return CompiledPolicies.compile(gateway, (NOT_UPSTREAM, BARE, LABELLED))


def key(name: str = "laptop", /, **labels: str) -> Key:
    """A client's key."""
    return Key(id=name, name=name, secret_hmac="", labels=labels)
