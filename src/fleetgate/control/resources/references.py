"""What documents say of one another: do the names they use exist, and do they make sense together?

The checks read what was written, not what was parsed, so that a mistake in one field hides none in another.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import msgspec
from pydantic_core import PydanticCustomError

from fleetgate.control.resources.field_types import parse_url
from fleetgate.control.resources.parser import ParsedDocument
from fleetgate.control.resources.problems import Problem, nearest
from fleetgate.control.resources.schema import ProviderName
from fleetgate.core.model import DEPLOYMENTS_MAX, ENDPOINTS_MAX, GATEWAYS_MAX

Documents = Mapping[tuple[str, str], Mapping[str, Any]]  # by kind and name: the document as written
MANAGED_PROVIDERS = ("local",)


class Reference(msgspec.Struct, frozen=True):
    """A name that one document uses of another."""

    field: str
    kind: str
    name: str


def references_of(kind: str, raw: Mapping[str, Any]) -> Iterable[Reference]:
    """The names that a document uses; what has not the right shape is left to the parser."""
    match kind:
        case "Deployment":
            if type(cluster := raw.get("cluster")) is str:
                yield Reference("cluster", "Cluster", cluster)
            if type(secret := _mapping(raw.get("credential")).get("secret")) is str:
                yield Reference("credential.secret", "Secret", secret)
            if type(profile := raw.get("profile")) is str:
                yield Reference("profile", "Profile", profile)
        case "Gateway":
            for at, upstream in enumerate(_list(raw.get("upstreams"))):
                if type(deployment := _mapping(upstream).get("deployment")) is str:
                    yield Reference(f"upstreams[{at}].deployment", "Deployment", deployment)
        case "Key":
            for at, gateway in enumerate(_list(raw.get("gateways"))):
                if type(gateway) is str:
                    yield Reference(f"gateways[{at}]", "Gateway", gateway)


def check(drafts: Iterable[ParsedDocument], stored: Documents) -> list[Problem]:
    """Every mistake that only shows when documents are seen together, in the file and in the store."""
    drafts = list(drafts)
    world = {**stored, **{(draft.kind, draft.name): draft.raw for draft in drafts}}
    problems: list[Problem] = []
    for draft in drafts:
        problems.extend(_missing(draft, world))
        match draft.kind:
            case "Deployment":
                problems.extend(_deployment(draft, world))
            case "Gateway":
                problems.extend(_gateway(draft, world))
            case "Cluster":
                problems.extend(_stranded(draft, drafts, world))
            case "Profile":
                problems.extend(_misfits(draft, drafts, world))
    return problems + _too_many(world)


def users_of(kind: str, name: str, world: Documents) -> list[str]:
    """The resources that name this one, as `Kind/name`."""
    return sorted(
        f"{user_kind}/{user_name}"
        for (user_kind, user_name), raw in world.items()
        if any((ref.kind, ref.name) == (kind, name) for ref in references_of(user_kind, raw))
    )


def _missing(draft: ParsedDocument, world: Documents) -> Iterable[Problem]:
    for reference in references_of(draft.kind, draft.raw):
        if (reference.kind, reference.name) in world:
            continue
        meant = nearest(reference.name, [name for kind, name in world if kind == reference.kind])
        fix = f"did you mean `{meant}`?" if meant else f"add a {reference.kind} of that name or correct the name"
        yield draft.problem(reference.field, f"there is no {reference.kind} {reference.name[:63]!r}", fix)


def _deployment(draft: ParsedDocument, world: Documents) -> Iterable[Problem]:
    raw = draft.raw
    given = [field for field in ("url", "urls", "workload") if raw.get(field) is not None]
    if not given:
        yield draft.problem("url", "is missing", "add `url:` for a running server or `workload:` for one to start")
    elif len(given) > 1:
        yield draft.problem(given[1], f"is given beside `{given[0]}`", f"keep one of {' and '.join(given)}")
    if raw.get("cluster") is None and raw.get("region") is None:
        yield draft.problem("region", "is missing", "add `region:` or `cluster:`")
    yield from _repeated(draft, "models", [_mapping(model).get("name") for model in _list(raw.get("models"))])
    yield from _repeated(draft, "urls", [_normal_url(url) for url in _list(raw.get("urls"))])
    if "workload" in given and len(given) == 1:
        yield from _managed(draft, world)
    yield from _profiled(draft, world)
    urls, committed = _list(raw.get("urls")), _mapping(raw.get("replicas")).get("committed")
    if urls and type(committed) is int and committed not in (1, len(urls)):  # 1 is what the API fills in
        fix = "remove it, since each of `urls` is one engine, or give one `url:` with all of them behind it"
        yield draft.problem("replicas.committed", f"is {committed}, but there are {len(urls)} urls", fix)
    price = _mapping(raw.get("price"))
    if price.get("usd_per_hour") is not None and len(price) > 1:
        yield draft.problem("price", "is by the hour and by the token", "keep usd_per_hour or the usd_per_mtok fields")


def _profiled(draft: ParsedDocument, world: Documents) -> Iterable[Problem]:
    """Does the Profile that a Deployment names belong to it?"""
    name = draft.raw.get("profile")
    profile = world.get(("Profile", name)) if type(name) is str else None
    if profile is None:
        return
    for message in _unlike(draft.raw, profile):
        fix = f"name a Profile that was measured on such a replica, or run `fleetgate calibrate {draft.name}`"
        yield draft.problem("profile", f"Profile {name} {message}", fix)


def _misfits(draft: ParsedDocument, drafts: list[ParsedDocument], world: Documents) -> Iterable[Problem]:
    """A changed Profile must still suit the Deployments of the store that name it; the file's are checked as such."""
    written = {d.name for d in drafts if d.kind == "Deployment"}
    for (kind, name), raw in world.items():
        if kind == "Deployment" and name not in written and raw.get("profile") == draft.name:
            for message in _unlike(raw, draft.raw):
                fix = "give the changed Profile another name, or change the Deployment in the same file"
                yield draft.problem("", f"Deployment {name} uses it, but it {message}", fix)


def _unlike(deployment: Mapping[str, Any], profile: Mapping[str, Any]) -> Iterable[str]:
    """What a Profile was measured on that a Deployment is not. Without a SKU of its own the operator's word stands."""
    served = [_mapping(model) for model in _list(deployment.get("models"))]
    names = {name for model in served for name in (model.get("name"), model.get("upstream_name")) if type(name) is str}
    model = profile.get("model")
    if type(model) is str and names and model not in names:
        yield f"is of model {model[:80]!r}, which the Deployment does not serve"
    sku = _mapping(deployment.get("accelerator")).get("sku")
    if type(sku) is not str:
        return
    for field, own in (("sku", sku), ("engine", deployment.get("engine"))):
        measured = profile.get(field)
        if type(measured) is str and type(own) is str and measured != own:
            yield f"is of {field} {measured[:64]!r}, and the Deployment's is {own[:64]!r}"


def _managed(draft: ParsedDocument, world: Documents) -> Iterable[Problem]:
    workload = _mapping(draft.raw.get("workload"))
    cluster = draft.raw.get("cluster")
    if cluster is None:
        yield draft.problem("cluster", "is missing", "a Deployment with `workload:` runs on a Cluster; name one")
        return
    if type(cluster) is not str:
        return
    provider = _mapping(world.get(("Cluster", cluster))).get("provider")
    if provider in get_args(ProviderName) and provider not in MANAGED_PROVIDERS:
        yield draft.problem(
            "workload",
            f"Cluster {cluster} is of provider {provider}, where Fleetgate cannot start replicas yet",
            "use a Cluster of provider local, or start the server yourself and give its `url:`",
        )
    elif provider == "local":
        if not workload.get("command"):
            yield draft.problem("workload.command", "is missing", "provider local runs commands: give the command")
        if workload.get("image") is not None:
            yield draft.problem("workload.image", "provider local runs no images", "give `command:` instead")


def _gateway(draft: ParsedDocument, world: Documents) -> Iterable[Problem]:
    upstreams = [_mapping(upstream).get("deployment") for upstream in _list(draft.raw.get("upstreams"))]
    yield from _repeated(draft, "upstreams", upstreams, ".deployment")
    policies = [_mapping(policy) for policy in _list(draft.raw.get("policies"))]
    yield from _repeated(draft, "policies", [policy.get("name") for policy in policies], ".name")
    for at, policy in enumerate(policies):
        for place, preferred in enumerate(_list(policy.get("prefer"))):
            if type(preferred) is str and preferred not in upstreams:
                field = f"policies[{at}].prefer[{place}]"
                message = f"Deployment {preferred[:63]!r} is not among the upstreams of this Gateway"
                meant = nearest(preferred, [name for name in upstreams if type(name) is str])
                fix = f"did you mean `{meant}`?" if meant else "add it to `upstreams:` or remove it here"
                yield draft.problem(field, message, fix)
    if draft.raw.get("default") is True:
        others = [
            name
            for (kind, name), raw in world.items()
            if kind == "Gateway" and name != draft.name and raw.get("default") is True
        ]
        if others:
            yield draft.problem("default", f"Gateway {others[0]} is the default already", "keep one `default: true`")


def _stranded(draft: ParsedDocument, drafts: list[ParsedDocument], world: Documents) -> Iterable[Problem]:
    """A changed Cluster must still carry the managed Deployments that the store has; the file's are checked as such."""
    written = {d.name for d in drafts if d.kind == "Deployment"}
    if draft.raw.get("provider") in MANAGED_PROVIDERS:
        return
    for (kind, name), raw in world.items():
        if kind == "Deployment" and name not in written and raw.get("workload") and raw.get("cluster") == draft.name:
            yield draft.problem("provider", f"Deployment {name} has a workload there", "keep local, or delete it first")


def _repeated(draft: ParsedDocument, field: str, values: list[Any], inner: str = "") -> Iterable[Problem]:
    counts = Counter(value for value in values if type(value) is str)
    for value, count in counts.items():
        if count > 1:
            at = len(values) - 1 - values[::-1].index(value)
            yield draft.problem(f"{field}[{at}]{inner}", f"{value[:80]!r} is given {count} times", "keep one of them")


def _normal_url(url: Any) -> str | None:
    try:
        return str(parse_url(url)) if type(url) is str else None
    except PydanticCustomError:
        return None  # the parser says what is wrong with it


def _too_many(world: Documents) -> list[Problem]:
    counts = Counter(kind for kind, _ in world)
    endpoints = sum(_endpoint_count(raw) for (kind, _), raw in world.items() if kind == "Deployment")
    checks = (
        ("Deployments", counts["Deployment"], DEPLOYMENTS_MAX),
        ("Gateways", counts["Gateway"], GATEWAYS_MAX),
        ("Endpoints", endpoints, ENDPOINTS_MAX),
    )
    return [
        Problem("", f"there would be {count} {what}", f"at most {most} fit; delete some or start a second Fleetgate")
        for what, count, most in checks
        if count > most
    ]


def _endpoint_count(raw: Mapping[str, Any]) -> int:
    if raw.get("workload") is not None:
        committed = _mapping(raw.get("replicas")).get("committed", 1)
        return committed if type(committed) is int else 0
    return len(_list(raw.get("urls"))) or 1


def _mapping(value: Any) -> Mapping[str, Any]:
    match value:
        case {}:
            return value  # type: ignore[no-any-return]
        case _:
            return {}


def _list(value: Any) -> list[Any]:
    return value if type(value) is list else []
