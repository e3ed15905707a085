"""The Profile, the price and the capacity of a Deployment, and a sentence that explains the capacity."""

from collections.abc import Iterable, Mapping
from typing import Any

from fleetgate.control.resources import schema as resources
from fleetgate.core import model
from fleetgate.core.capacity import units as capacity


def profile_of(written: resources.Profile, source: model.ProfileSource) -> model.Profile:
    """A Profile of the Snapshot."""
    return model.Profile(
        name=written.name,
        prefill_tokens_per_s=float(written.prefill_tokens_per_s),
        base_s=float(written.decode_step.base_s),
        per_sequence_s=float(written.decode_step.per_sequence_s),
        batch_max=written.batch_max,
        kv_tokens=written.kv_tokens,
        concurrency=written.concurrency or 0,
        units=float(written.units or 0.0),
        source=source,
    )


def choose_profile(deployment: resources.Deployment, stored: Mapping[str, resources.Profile]) -> model.Profile | None:
    """The Profile that a Deployment names, otherwise one measured on the same model, SKU, count and engine.

    Of several such Profiles it is the one of the model listed first, then the first by name.
    """
    if deployment.profile is not None:
        named = stored.get(deployment.profile)
        return None if named is None else profile_of(named, model.ProfileSource.WRITTEN)
    accelerator = deployment.accelerator
    if accelerator is None:
        return None
    rank = {name: at for at, served in enumerate(deployment.models) for name in (served.upstream_name, served.name)}
    matching = [
        profile
        for profile in stored.values()
        if profile.model in rank
        and (profile.sku, profile.engine) == (accelerator.sku, deployment.engine)
        and profile.accelerators_per_replica == accelerator.count
    ]
    if not matching:
        return None
    best = min(matching, key=lambda profile: (rank[profile.model], profile.name))
    return profile_of(best, model.ProfileSource.PEER)


def accelerators_of(deployment: resources.Deployment, named: resources.Profile | None) -> int:
    """The number of accelerators of one replica, 0 if it is unknown."""
    if deployment.accelerator is not None:
        return deployment.accelerator.count
    return named.accelerators_per_replica if named is not None else 0


def price_of(deployment: resources.Deployment, cluster: resources.Cluster | None) -> model.Price:
    """The price of a Deployment: as written, otherwise its Cluster's price per hour for all its accelerators."""
    written, accelerator = deployment.price, deployment.accelerator
    if written is not None:
        return model.Price(
            usd_per_hour=_float(written.usd_per_hour),
            usd_per_mtok_input=_float(written.usd_per_mtok_input),
            usd_per_mtok_output=_float(written.usd_per_mtok_output),
        )
    if accelerator is None or cluster is None:
        return model.Price()
    each = next(
        (
            offer.usd_per_hour
            for offer in cluster.accelerators
            if (offer.sku, offer.tier) == (accelerator.sku, deployment.tier) and offer.usd_per_hour is not None
        ),
        None,
    )
    if each is None:
        return model.Price()
    return model.Price(usd_per_hour=each * accelerator.count * deployment.engines)


def strictest_tpot_s(gateways: Iterable[model.Gateway], deployment: str) -> float:
    """The TPOT target of a Deployment: the strictest of the Gateways that list it, otherwise the default."""
    targets_s = [
        gateway.slo.tpot_s
        for gateway in gateways
        if gateway.slo is not None and any(upstream.deployment == deployment for upstream in gateway.upstreams)
    ]
    return min(targets_s, default=model.Slo().tpot_s)


def profile_description(deployment: model.Deployment, tpot_s: float, learned_limit: int = 0) -> dict[str, Any]:
    """The capacity of a Deployment for display: CU, the token form, the limit and the source of the figures.

    Units: `learned_limit` is the limit in requests that the proxies apply now, 0 if they have not reported one.
    """
    profile, engines = deployment.profile, max(1, sum(one.engines for one in deployment.endpoints))
    limit = learned_limit or deployment.concurrency_max
    if profile is None:
        return {
            "units": deployment.units or None,
            "limit": limit or None,
            "tpot_s": tpot_s,
            "profile": None,
            "sentence": _unmeasured(deployment, limit),
        }
    limit = limit or capacity.limit_of(profile, tpot_s, engines)
    return {
        "units": deployment.units,
        "limit": limit,
        "tpot_s": tpot_s,
        "profile": profile.name,
        "source": profile.source.value,
        "prompt_token_weight": 1.0,
        "output_token_weight": capacity.output_weight(profile, tpot_s),
        "tokens_per_unit": capacity.tokens_per_unit(profile, tpot_s),
        "sentence": _measured(deployment, profile, tpot_s, limit),
    }


def _measured(deployment: model.Deployment, profile: model.Profile, tpot_s: float, limit: int) -> str:
    engines = max(1, sum(one.engines for one in deployment.endpoints))
    units = capacity.units_of(profile, tpot_s) * engines
    source = {
        model.ProfileSource.WRITTEN: f"Profile {profile.name}",
        model.ProfileSource.PEER: f"Profile {profile.name} (measured on the same model, SKU and engine)",
        model.ProfileSource.GUESS: "an estimate that its streams correct",
    }[profile.source]
    times = f" times {engines} engines" if engines > 1 else ""
    written = f" (`capacity` says {deployment.units:.3g})" if abs(units - deployment.units) > 1e-6 * units else ""
    limited = "as written" if deployment.concurrency_written else "0.9 of the knee, corrected by its responses"
    return (
        f"{units:.3g} CU from {source}{times}, at a TPOT of {tpot_s:g} s{written}; a request counts its uncached "
        f"prompt tokens once and its output tokens {capacity.output_weight(profile, tpot_s):.1f} times; "
        f"at most {limit} requests at once, {limited}."
    )


def _unmeasured(deployment: model.Deployment, limit: int) -> str:
    hint = f"`fleetgate calibrate {deployment.name}` measures it"
    if deployment.units:
        at_once = f" and at most {limit} requests at once" if limit else ""
        return f"{deployment.units:.3g} CU{at_once}, as written in `capacity`; it has no Profile: {hint}."
    return f"The capacity is not known yet: the proxies learn it from responses and refusals; {hint}."


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
