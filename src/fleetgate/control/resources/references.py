"""Checks across documents: the names they use exist, and the documents fit together.

The checks read the documents as written and not as parsed, so that a mistake in one field hides none in another.
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

Documents = Mapping[tuple[str, str], Mapping[str, Any]]  # the documents as written, by kind and name
MANAGED_PROVIDERS = ("local",)


class Reference(msgspec.Struct, frozen=True):
    """The name of another document that a document uses in a field."""

    field: str
    kind: str
    name: str


def references_of(kind: str, raw: Mapping[str, Any]) -> Iterable[Reference]:
    """The names that a document uses. The parser reports fields of a wrong type, so they are skipped here."""
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


def check(parsed_documents: Iterable[ParsedDocument], stored: Documents) -> list[Problem]:
    """Every mistake that shows only when all documents, given and stored, are checked together."""
    parsed_documents = list(parsed_documents)
    documents = {**stored, **{(parsed.kind, parsed.name): parsed.raw for parsed in parsed_documents}}
    problems: list[Problem] = []
    for parsed in parsed_documents:
        problems.extend(_check_references(parsed, documents))
        match parsed.kind:
            case "Deployment":
                problems.extend(_check_deployment(parsed, documents))
            case "Gateway":
                problems.extend(_check_gateway(parsed, documents))
            case "Cluster":
                problems.extend(_check_cluster(parsed, parsed_documents, documents))
            case "Profile":
                problems.extend(_check_profile(parsed, parsed_documents, documents))
    return problems + _check_counts(documents)


def users_of(kind: str, name: str, documents: Documents) -> list[str]:
    """The resources that use this one, as `Kind/name`."""
    return sorted(
        f"{user_kind}/{user_name}"
        for (user_kind, user_name), raw in documents.items()
        if any((ref.kind, ref.name) == (kind, name) for ref in references_of(user_kind, raw))
    )


def _check_references(parsed: ParsedDocument, documents: Documents) -> Iterable[Problem]:
    for reference in references_of(parsed.kind, parsed.raw):
        if (reference.kind, reference.name) in documents:
            continue
        similar = nearest(reference.name, [name for kind, name in documents if kind == reference.kind])
        fix = f"did you mean `{similar}`?" if similar else f"add a {reference.kind} of that name or correct the name"
        yield parsed.problem(reference.field, f"there is no {reference.kind} {reference.name[:63]!r}", fix)


def _check_deployment(parsed: ParsedDocument, documents: Documents) -> Iterable[Problem]:
    raw = parsed.raw
    given = [field for field in ("url", "urls", "workload") if raw.get(field) is not None]
    if not given:
        fix = "add `url:` for a running server or `workload:` for a server that Fleetgate starts"
        yield parsed.problem("url", "is missing", fix)
    elif len(given) > 1:
        yield parsed.problem(given[1], f"is given beside `{given[0]}`", f"keep one of {' and '.join(given)}")
    if raw.get("cluster") is None and raw.get("region") is None:
        yield parsed.problem("region", "is missing", "add `region:` or `cluster:`")
    yield from _check_unique(parsed, "models", [_mapping(model).get("name") for model in _list(raw.get("models"))])
    yield from _check_unique(parsed, "urls", [_normal_url(url) for url in _list(raw.get("urls"))])
    if "workload" in given and len(given) == 1:
        yield from _check_workload(parsed, documents)
    yield from _check_named_profile(parsed, documents)
    urls, committed = _list(raw.get("urls")), _mapping(raw.get("replicas")).get("committed")
    if urls and type(committed) is int and committed not in (1, len(urls)):  # 1 is what the API fills in
        fix = "remove it, because each of `urls` is one engine, or give one `url:` for all engines behind it"
        yield parsed.problem("replicas.committed", f"is {committed}, but there are {len(urls)} urls", fix)
    price = _mapping(raw.get("price"))
    if price.get("usd_per_hour") is not None and len(price) > 1:
        fix = "keep `usd_per_hour` or the `usd_per_mtok` fields"
        yield parsed.problem("price", "is given by the hour and by the token", fix)


def _check_named_profile(parsed: ParsedDocument, documents: Documents) -> Iterable[Problem]:
    """The Profile that a Deployment names must have been measured on such a replica."""
    name = parsed.raw.get("profile")
    profile = documents.get(("Profile", name)) if type(name) is str else None
    if profile is None:
        return
    for message in _differences(parsed.raw, profile):
        fix = f"name a Profile that was measured on such a replica, or run `fleetgate calibrate {parsed.name}`"
        yield parsed.problem("profile", f"Profile {name} {message}", fix)


def _check_profile(
    parsed: ParsedDocument, parsed_documents: list[ParsedDocument], documents: Documents
) -> Iterable[Problem]:
    """A changed Profile must fit the stored Deployments that name it; given Deployments are checked by themselves."""
    written = {d.name for d in parsed_documents if d.kind == "Deployment"}
    for (kind, name), raw in documents.items():
        if kind == "Deployment" and name not in written and raw.get("profile") == parsed.name:
            for message in _differences(raw, parsed.raw):
                fix = "give the changed Profile another name, or change the Deployment in the same file"
                yield parsed.problem("", f"Deployment {name} uses it, but it {message}", fix)


def _differences(deployment: Mapping[str, Any], profile: Mapping[str, Any]) -> Iterable[str]:
    """How a Deployment differs from what a Profile was measured on.

    A Deployment without an accelerator is compared by model only: the operator decided that the Profile fits.
    """
    served = [_mapping(model) for model in _list(deployment.get("models"))]
    names = {name for model in served for name in (model.get("name"), model.get("upstream_name")) if type(name) is str}
    model = profile.get("model")
    if type(model) is str and names and model not in names:
        yield f"is for model {model[:80]!r}, which the Deployment does not serve"
    sku = _mapping(deployment.get("accelerator")).get("sku")
    if type(sku) is not str:
        return
    for field, own in (("sku", sku), ("engine", deployment.get("engine"))):
        measured = profile.get(field)
        if type(measured) is str and type(own) is str and measured != own:
            yield f"is for {field} {measured[:64]!r}, but the Deployment has {own[:64]!r}"


def _check_workload(parsed: ParsedDocument, documents: Documents) -> Iterable[Problem]:
    workload = _mapping(parsed.raw.get("workload"))
    cluster = parsed.raw.get("cluster")
    if cluster is None:
        yield parsed.problem("cluster", "is missing", "name the Cluster on which the `workload:` runs")
        return
    if type(cluster) is not str:
        return
    provider = _mapping(documents.get(("Cluster", cluster))).get("provider")
    if provider in get_args(ProviderName) and provider not in MANAGED_PROVIDERS:
        yield parsed.problem(
            "workload",
            f"Cluster {cluster} has provider {provider}, on which Fleetgate cannot start replicas yet",
            "use a Cluster with provider local, or start the server yourself and give its `url:`",
        )
    elif provider == "local":
        if not workload.get("command"):
            yield parsed.problem("workload.command", "is missing", "give the command that provider local starts")
        if workload.get("image") is not None:
            yield parsed.problem(
                "workload.image", "is given, but provider local runs no images", "give `command:` instead"
            )


def _check_gateway(parsed: ParsedDocument, documents: Documents) -> Iterable[Problem]:
    upstreams = [_mapping(upstream).get("deployment") for upstream in _list(parsed.raw.get("upstreams"))]
    yield from _check_unique(parsed, "upstreams", upstreams, ".deployment")
    policies = [_mapping(policy) for policy in _list(parsed.raw.get("policies"))]
    yield from _check_unique(parsed, "policies", [policy.get("name") for policy in policies], ".name")
    for at, policy in enumerate(policies):
        for position, preferred in enumerate(_list(policy.get("prefer"))):
            if type(preferred) is str and preferred not in upstreams:
                field = f"policies[{at}].prefer[{position}]"
                message = f"Deployment {preferred[:63]!r} is not among the upstreams of this Gateway"
                similar = nearest(preferred, [name for name in upstreams if type(name) is str])
                fix = f"did you mean `{similar}`?" if similar else "add it to `upstreams:` or remove it here"
                yield parsed.problem(field, message, fix)
    if parsed.raw.get("default") is True:
        others = [
            name
            for (kind, name), raw in documents.items()
            if kind == "Gateway" and name != parsed.name and raw.get("default") is True
        ]
        if others:
            yield parsed.problem("default", f"Gateway {others[0]} is the default already", "keep one `default: true`")


def _check_cluster(
    parsed: ParsedDocument, parsed_documents: list[ParsedDocument], documents: Documents
) -> Iterable[Problem]:
    """A changed Cluster must fit its stored managed Deployments; given Deployments are checked by themselves."""
    written = {d.name for d in parsed_documents if d.kind == "Deployment"}
    if parsed.raw.get("provider") in MANAGED_PROVIDERS:
        return
    for (kind, name), raw in documents.items():
        if kind == "Deployment" and name not in written and raw.get("workload") and raw.get("cluster") == parsed.name:
            yield parsed.problem(
                "provider",
                f"Deployment {name} has a workload on it",
                "keep provider local, or delete the Deployment first",
            )


def _check_unique(parsed: ParsedDocument, field: str, values: list[Any], inner: str = "") -> Iterable[Problem]:
    counts = Counter(value for value in values if type(value) is str)
    for value, count in counts.items():
        if count > 1:
            at = len(values) - 1 - values[::-1].index(value)
            yield parsed.problem(f"{field}[{at}]{inner}", f"{value[:80]!r} is given {count} times", "keep one of them")


def _normal_url(url: Any) -> str | None:
    try:
        return str(parse_url(url)) if type(url) is str else None
    except PydanticCustomError:
        return None  # the parser reports the mistake


def _check_counts(documents: Documents) -> list[Problem]:
    counts = Counter(kind for kind, _ in documents)
    endpoints = sum(_endpoint_count(raw) for (kind, _), raw in documents.items() if kind == "Deployment")
    checks = (
        ("Deployments", counts["Deployment"], DEPLOYMENTS_MAX),
        ("Gateways", counts["Gateway"], GATEWAYS_MAX),
        ("Endpoints", endpoints, ENDPOINTS_MAX),
    )
    return [
        Problem("", f"there would be {count} {what}", f"keep at most {most}: delete some or start a second Fleetgate")
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
