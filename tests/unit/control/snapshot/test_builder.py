"""From Profiles, prices and replicas as they are written to what proxies read."""

from collections.abc import Mapping
from typing import Any

import pytest

from fleetgate.control.snapshot import profiles
from fleetgate.control.snapshot.builder import build, snapshot_parts
from fleetgate.control.store.repository import StoredResource
from fleetgate.core import model
from fleetgate.core.capacity import units as capacity

CLUSTER: dict[str, Any] = {
    "kind": "Cluster",
    "name": "neo",
    "provider": "external",
    "region": "us-east",
    "accelerators": [
        {"sku": "H100", "count": 32, "tier": "committed", "usd_per_hour": 1.85},
        {"sku": "H100", "count": 16, "tier": "elastic", "usd_per_hour": 2.99},
    ],
}
PROFILE: dict[str, Any] = {
    "kind": "Profile",
    "name": "llama-h100x8",
    "model": "llama",
    "sku": "H100",
    "accelerators_per_replica": 8,
    "engine": "vllm",
    "prefill_tokens_per_s": 15000,
    "decode_step": {"base_s": 0.028, "per_sequence_s": 0.00035},
    "batch_max": 128,
}
DEPLOYMENT: dict[str, Any] = {
    "kind": "Deployment",
    "name": "d",
    "cluster": "neo",
    "models": [{"name": "llama", "upstream_name": "meta/llama"}],
    "engine": "vllm",
    "url": "https://10.0.0.1/v1",
    "accelerator": {"sku": "H100", "count": 8},
}
MANAGED: dict[str, Any] = {
    **{field: value for field, value in DEPLOYMENT.items() if field != "url"},
    "workload": {"command": ["serve"]},
    "replicas": {"committed": 4},
}


def gateway(name: str, tpot_s: float | None, *deployments: str) -> dict[str, Any]:
    base = {"kind": "Gateway", "name": name, "domain": "test", "protocol": "openai", "strategy": "overflow"}
    slo = {} if tpot_s is None else {"slo": {"tpot_s": tpot_s}}
    return {**base, **slo, "upstreams": [{"deployment": deployment} for deployment in deployments]}


def snapshot(*documents: Mapping[str, Any], ready: Mapping[str, tuple[str, ...]] | None = None) -> model.Snapshot:
    world = {
        (document["kind"], document["name"]): StoredResource(
            document["kind"], document["name"], dict(document), 1, True, 0, 0
        )
        for document in (CLUSTER, *documents)
    }
    return build(
        snapshot_parts(world), ready or {}, lambda _, names: {name: at for at, name in enumerate(names)}, lambda *_: ""
    )


def deployment(*documents: Mapping[str, Any], ready: tuple[str, ...] = ()) -> model.Deployment:
    return snapshot(*documents, ready={"d": ready}).deployments[0]


def test_a_profile_that_is_named_is_used_as_written() -> None:
    made = deployment(PROFILE, {**DEPLOYMENT, "profile": "llama-h100x8"})
    assert made.profile is not None
    assert made.profile.source is model.ProfileSource.WRITTEN
    assert (made.profile.prefill_tokens_per_s, made.profile.base_s, made.profile.per_sequence_s) == (
        15000.0,
        0.028,
        0.00035,
    )
    assert (made.profile.batch_max, made.profile.kv_tokens, made.profile.units) == (128, 0, 0.0)
    assert made.units == capacity.units_of(made.profile, 0.05)
    assert (made.concurrency_max, made.concurrency_written) == (0, False)
    assert (made.sku, made.accelerators) == ("H100", 8)


@pytest.mark.parametrize(
    ("fields", "is_peer"),
    [
        ({}, True),
        ({"model": "meta/llama"}, True),
        ({"model": "other"}, False),
        ({"sku": "A100"}, False),
        ({"engine": "sglang"}, False),
        ({"accelerators_per_replica": 4}, False),
    ],
)
def test_a_peer_has_the_same_model_sku_count_and_engine(fields: dict[str, Any], is_peer: bool) -> None:
    made = deployment({**PROFILE, **fields}, DEPLOYMENT)
    assert (made.profile is not None and made.profile.source is model.ProfileSource.PEER) == is_peer
    assert (made.units > 0.0) == is_peer


def test_without_a_sku_nobody_is_a_peer() -> None:
    assert deployment(PROFILE, {**DEPLOYMENT, "accelerator": None}).profile is None


def test_a_profile_is_for_one_engine_and_typed_capacity_for_all() -> None:
    one = deployment(PROFILE, DEPLOYMENT)
    four = deployment(PROFILE, {**DEPLOYMENT, "replicas": {"committed": 4}})
    assert [endpoint.engines for endpoint in four.endpoints] == [4]
    assert four.units == pytest.approx(4 * one.units)
    three = {**DEPLOYMENT, "url": None, "urls": [f"https://10.0.0.{n}/v1" for n in range(3)]}
    assert [endpoint.engines for endpoint in deployment(PROFILE, three).endpoints] == [1, 1, 1]
    assert deployment(PROFILE, three).units == pytest.approx(3 * one.units)
    typed = {**DEPLOYMENT, "replicas": {"committed": 4}, "capacity": {"concurrency": 64, "units": 9.0}}
    made = deployment(PROFILE, typed)
    assert (made.units, made.concurrency_max, made.concurrency_written) == (9.0, 64, True)


def test_what_is_ready_of_a_managed_deployment_counts() -> None:
    urls = ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    one = deployment(PROFILE, DEPLOYMENT).units
    assert deployment(PROFILE, MANAGED, ready=urls).units == pytest.approx(2 * one)
    assert deployment(PROFILE, MANAGED).units == pytest.approx(one), "0 would mean that nothing is known"
    typed = deployment(PROFILE, {**MANAGED, "capacity": {"units": 8.0, "concurrency": 40}}, ready=urls)
    assert (typed.units, typed.concurrency_max) == (4.0, 20)


def test_without_profile_and_units_a_limit_stands_for_them_and_else_they_are_to_be_learned() -> None:
    assert deployment({**DEPLOYMENT, "capacity": {"concurrency": 64}}).units == 64.0
    assert deployment(DEPLOYMENT).units == 0.0


def test_the_strictest_slo_of_the_gateways_that_list_it_decides() -> None:
    def units(*gateways: dict[str, Any]) -> float:
        return snapshot(PROFILE, DEPLOYMENT, {**DEPLOYMENT, "name": "e"}, *gateways).deployments[0].units

    by_default = units()
    assert units(gateway("a", None, "d")) == by_default
    assert units(gateway("a", 0.1, "d")) > by_default
    assert units(gateway("a", 0.1, "d"), gateway("b", 0.04, "d"), gateway("c", 0.03, "e")) == units(
        gateway("b", 0.04, "d")
    )


@pytest.mark.parametrize(
    ("fields", "usd_per_hour"),
    [
        ({}, 8 * 1.85),
        ({"replicas": {"committed": 4}}, 4 * 8 * 1.85),
        ({"tier": "elastic"}, 8 * 2.99),
        ({"tier": "spot"}, None),
        ({"accelerator": {"sku": "A100", "count": 8}}, None),
        ({"accelerator": None}, None),
        ({"price": {"usd_per_hour": 7}}, 7.0),
        ({"price": {"usd_per_mtok_input": 1}}, None),
    ],
)
def test_a_price_is_as_written_or_by_the_clusters_accelerators(
    fields: dict[str, Any], usd_per_hour: float | None
) -> None:
    made = deployment({**DEPLOYMENT, **fields})
    assert made.price.usd_per_hour == pytest.approx(usd_per_hour)
    assert made.paid_per_token == ("usd_per_mtok_input" in fields.get("price", {}))


def test_capacity_is_told_with_its_source() -> None:
    measured = deployment(PROFILE, {**DEPLOYMENT, "replicas": {"committed": 2}})
    told = profiles.profile_description(measured, 0.05)
    assert told["limit"] == capacity.limit_of(measured.profile or pytest.fail(), 0.05, 2)
    assert told["tokens_per_unit"] == pytest.approx(1000 + 200 * told["output_token_weight"])
    for part in ("Profile llama-h100x8 (measured on the same model", "2 engines", f"{measured.units:.3g} CU"):
        assert part in told["sentence"]
    assert profiles.profile_description(measured, 0.05, learned_limit=7)["limit"] == 7
    assert (
        "as written"
        in profiles.profile_description(deployment({**DEPLOYMENT, "capacity": {"concurrency": 5}}), 0.05)["sentence"]
    )
    assert "calibrate d" in profiles.profile_description(deployment(DEPLOYMENT), 0.05)["sentence"]
