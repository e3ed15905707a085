"""Build a Snapshot for the proxies from the stored resources."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from fleetgate.control.resources import schema as resources
from fleetgate.control.resources.apply import parse_stored
from fleetgate.control.resources.field_types import expires_at_s, parse_url
from fleetgate.control.snapshot import profiles
from fleetgate.control.store.repository import StoredKey, StoredResource, StoredResources
from fleetgate.core import model
from fleetgate.core.capacity.units import units_of
from fleetgate.providers.base import ManagedDeployment, ReplicaWorkload

Slots = Mapping[str, int]


class SnapshotParts(msgspec.Struct, frozen=True):
    """The stored resources by kind, as values."""

    clusters: dict[str, resources.Cluster]
    deployments: dict[str, tuple[StoredResource, resources.Deployment]]
    gateways: dict[str, resources.Gateway]
    profiles: dict[str, resources.Profile]
    keys: dict[str, tuple[StoredResource, resources.Key]]


def snapshot_parts(stored_resources: StoredResources) -> SnapshotParts:
    """Group the stored resources by kind."""
    parts = SnapshotParts({}, {}, {}, {}, {})
    for stored in stored_resources.values():
        match parse_stored(stored):
            case resources.Cluster() as cluster:
                parts.clusters[stored.name] = cluster
            case resources.Deployment() as deployment:
                parts.deployments[stored.name] = (stored, deployment)
            case resources.Gateway() as gateway:
                parts.gateways[stored.name] = gateway
            case resources.Profile() as profile:
                parts.profiles[stored.name] = profile
            case resources.Key() as key:
                parts.keys[stored.name] = (stored, key)
    return parts


def base_urls(parts: SnapshotParts, ready: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The base URLs of each Deployment, normalized and unique: as written, or of the ready replicas if managed."""
    found = {}
    for name, (_, deployment) in parts.deployments.items():
        urls = ready.get(name, ()) if deployment.workload is not None else deployment.base_urls()
        found[name] = tuple(dict.fromkeys(str(parse_url(url)) for url in urls))
    return found


def endpoint_owner(deployment: str, url: str) -> str:
    """The name that owns the slot of an Endpoint."""
    return f"{deployment} {url}"


def endpoint(url: str, slot: int, engines: int = 1) -> model.Endpoint:
    """An Endpoint of the Snapshot."""
    parts = parse_url(url)
    return model.Endpoint(
        slot=slot, scheme=parts.scheme, host=parts.host, port=parts.port, base_path=parts.path, engines=engines
    )


class DeploymentEndpoints(msgspec.Struct, frozen=True):
    """What the Snapshot adds to the document of a Deployment: slot, Endpoints, sealed credential, TPOT target.

    Units: `tpot_s` is its strictest TPOT target.
    """

    slot: int
    endpoints: tuple[model.Endpoint, ...]
    credential: str
    tpot_s: float


def deployment_of(parts: SnapshotParts, name: str, assigned: DeploymentEndpoints) -> model.Deployment:
    """A Deployment of the Snapshot. It inherits region and labels from its Cluster."""
    stored, written = parts.deployments[name]
    cluster = parts.clusters.get(written.cluster or "")
    labels = {**(cluster.labels if cluster else {}), **(written.labels or {})}
    managed = written.workload is not None
    named = parts.profiles.get(written.profile or "")
    price = profiles.price_of(written, cluster)
    capacity = _capacity_of(written, assigned, profiles.choose_profile(written, parts.profiles))
    return model.Deployment(
        slot=assigned.slot,
        name=name,
        region=written.region or (cluster.region if cluster else ""),
        engine=written.engine,
        models={served.name: served.upstream_name or served.name for served in written.models},
        endpoints=assigned.endpoints,
        cluster=written.cluster or "",
        labels=labels,
        tier=model.Tier(written.tier),
        paid_per_token=price.usd_per_hour is None and written.price is not None,
        price=price,
        sku=written.accelerator.sku if written.accelerator else named.sku if named else "",
        accelerators=profiles.accelerators_of(written, named),
        profile=capacity.profile,
        concurrency_max=capacity.concurrency_max,
        concurrency_written=capacity.concurrency_max > 0,
        units=capacity.units,
        credential=assigned.credential,
        health_path=_health_path(written),
        # The provider chooses the address of a managed replica, so it needs no check.
        egress_checked=not (stored.trusted or managed),
    )


class _Capacity(msgspec.Struct, frozen=True):
    """The capacity of a Deployment with its current replicas."""

    profile: model.Profile | None
    concurrency_max: int
    units: float


def _capacity_of(
    written: resources.Deployment, assigned: DeploymentEndpoints, profile: model.Profile | None
) -> _Capacity:
    """A written capacity holds for all replicas and scales with the ready ones; a Profile holds for each replica.

    Without either, units are 0 and the proxies learn them.
    """
    ready = sum(one.engines for one in assigned.endpoints)
    share = min(1.0, ready / max(1, written.replicas.committed)) if written.workload is not None else 1.0
    concurrency = written.capacity.concurrency or 0
    if profile is not None and written.capacity.units is None:
        units = units_of(profile, assigned.tpot_s) * max(1, ready)
    else:
        units = written.capacity.units or float(concurrency)
        units = units * share or units  # 0 would mean "unknown"; without a ready replica nothing is sent there
    return _Capacity(profile, max(1, int(concurrency * share)) if concurrency else 0, units)


def managed_of(parts: SnapshotParts) -> tuple[ManagedDeployment, ...]:
    """The Deployments with replicas that the reconciler keeps running."""
    return tuple(
        ManagedDeployment(
            name=name,
            cluster=cluster.name,
            provider=cluster.provider,
            region=written.region or cluster.region,
            workload=ReplicaWorkload(
                image=workload.image or "",
                command=tuple(workload.command),
                args=tuple(workload.args),
                env=workload.env,
                port=workload.port or 0,
                health=workload.health,
            ),
            replicas_desired=written.replicas.committed,
        )
        for name, (_, written) in parts.deployments.items()
        if (workload := written.workload) is not None
        and (cluster := parts.clusters.get(written.cluster or "")) is not None
    )


def _health_path(written: resources.Deployment) -> str:
    """The path of the readiness probe, empty for the engine's default."""
    if written.health is not None:
        return written.health.path
    return written.workload.health if written.workload is not None else ""


def gateway_of(written: resources.Gateway, slot: int) -> model.Gateway:
    """A Gateway of the Snapshot."""
    admission, resilience, slo = written.admission, written.resilience, written.slo
    return model.Gateway(
        slot=slot,
        name=written.name,
        domain=written.domain,
        protocol=written.protocol,
        strategy=written.strategy,
        upstreams=tuple(
            model.Upstream(deployment=upstream.deployment, rank=upstream.rank or position)
            for position, upstream in enumerate(written.upstreams, start=1)
        ),
        default=written.default,
        overflow_at=float(written.overflow_at),
        locality=written.locality,
        tiers=written.tiers,
        seconds_per_usd=float(written.seconds_per_usd),
        admission=model.Admission(queue_max=admission.queue_max, queue_timeout_s=float(admission.queue_timeout_s)),
        resilience=model.Resilience(
            attempts_max=resilience.attempts_max,
            retry_budget=float(resilience.retry_budget),
            connect_timeout_s=float(resilience.connect_timeout_s),
            resume=resilience.resume,
            hedge=resilience.hedge,
        ),
        slo=None
        if slo is None
        else model.Slo(
            ttft_s=float(slo.ttft_s),
            ttft_s_per_1k_tokens=float(slo.ttft_s_per_1k_tokens),
            tpot_s=float(slo.tpot_s),
        ),
        policies=tuple(_policy(policy) for policy in written.policies),
    )


def _policy(written: resources.Policy) -> model.Policy:
    return model.Policy(
        name=written.name,
        when=written.when or "",
        require=written.require or "",
        prefer=tuple(written.prefer or ()),
        priority=written.set.priority if written.set is not None else "",
        python=written.python or "",
    )


def keys_of(parts: SnapshotParts, stored_keys: Mapping[str, StoredKey]) -> tuple[model.Key, ...]:
    """The keys of the Snapshot. Expired keys stay in it, because the proxy reports an expired key as such."""
    return tuple(
        model.Key(
            id=stored_keys[name].id,
            name=name,
            secret_hmac=stored_keys[name].secret_hmac,
            gateways=tuple(key.gateways),
            models=tuple(key.models),
            labels=key.labels,
            expires_s=expires_at_s(key.expires, stored.created_s),
            kill_streams=key.kill_streams,
            require_fresh_s=key.require_fresh_s,
        )
        for name, (stored, key) in parts.keys.items()
        if name in stored_keys
    )


def same_but_for_version(new: model.Snapshot, old: model.Snapshot) -> bool:
    """Whether two Snapshots are equal except for version and time."""
    return msgspec.structs.replace(new, version=old.version, made_at_s=old.made_at_s) == old


Credential = Callable[[str, str], str]  # Deployment and Secret name -> the value, sealed for the Deployment
Assign = Callable[[str, Sequence[str]], Slots]  # space and owners -> slots


def build(
    parts: SnapshotParts, ready: Mapping[str, tuple[str, ...]], assign: Assign, credential: Credential
) -> model.Snapshot:
    """A Snapshot without keys, egress ranges, version and time, which the publisher adds."""
    urls = base_urls(parts, ready)
    deployment_slots = assign("deployment", list(parts.deployments))
    endpoint_slots = assign("endpoint", [endpoint_owner(name, url) for name in urls for url in urls[name]])
    gateway_slots = assign("gateway", list(parts.gateways))
    gateways = tuple(gateway_of(gateway, gateway_slots[name]) for name, gateway in parts.gateways.items())
    deployments = []
    for name, (_, written) in parts.deployments.items():
        owners = {url: endpoint_slots.get(endpoint_owner(name, url)) for url in urls[name]}
        engines = written.engines if written.url is not None else 1
        assigned = DeploymentEndpoints(
            slot=deployment_slots[name],
            endpoints=tuple(endpoint(url, slot, engines) for url, slot in owners.items() if slot is not None),
            credential=credential(name, written.credential.secret) if written.credential else "",
            tpot_s=profiles.strictest_tpot_s(gateways, name),
        )
        deployments.append(deployment_of(parts, name, assigned))
    return model.Snapshot(
        version=0,
        made_at_s=0.0,
        gateways=gateways,
        deployments=tuple(deployments),
    )
