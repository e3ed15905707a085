"""Two Deployments, a Gateway over them and short ways to write policies."""

from itertools import count

from fleetgate.core.model import Deployment, Gateway, Key, Policy, Price, Tier, Upstream
from fleetgate.policies.policy_set import CompiledPolicies

RICH = Deployment(
    slot=0,
    name="rich",
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
STRANGER = Deployment(slot=2, name="stranger", region="eu-west", engine="vllm", models={"m": "m"}, endpoints=())


def policy(**fields: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """A policy that `rules` gives a name."""
    return fields


def rules(*policies: dict[str, str | tuple[str, ...]]) -> CompiledPolicies:
    """Policies over both Deployments."""
    return compiled(*(made(number, fields) for number, fields in zip(count(), policies, strict=False)))


def made(number: int, fields: dict[str, str | tuple[str, ...]]) -> Policy:
    """One policy; its name is p and its number where none is given."""
    return Policy(**{"name": f"p{number}", **fields})  # type: ignore[arg-type]


def compiled(*policies: Policy) -> CompiledPolicies:
    """Policies over both Deployments."""
    gateway = Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy="overflow",
        upstreams=(Upstream(deployment="rich", rank=1), Upstream(deployment="bare", rank=2)),
        policies=policies,
    )
    return CompiledPolicies.compile(gateway, (STRANGER, BARE, RICH))


def key(name: str = "laptop", /, **labels: str) -> Key:
    """A client's key."""
    return Key(id=name, name=name, secret_hmac="", labels=labels)
