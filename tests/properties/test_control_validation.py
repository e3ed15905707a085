"""Documents nobody would write: never a crash, never a half-applied set, and each refusal has a place and a fix."""

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetgate.control.data_dir import open_data_dir
from fleetgate.control.resources.apply import API, CONFIG, ResourceWriter, find_problems
from fleetgate.control.resources.parser import parse_documents
from fleetgate.control.resources.problems import ResourceRefused
from fleetgate.control.snapshot.publisher import Publisher
from fleetgate.control.store import repository as rows
from fleetgate.control.store.database import Database
from fleetgate.core.model import decode_snapshot
from fleetgate.core.routing.route import model_routes
from fleetgate.ipc.signed_file import public_key, verified

GOOD: list[dict[str, Any]] = [
    {
        "kind": "Cluster",
        "name": "home",
        "provider": "local",
        "region": "us-east",
        "labels": {"vendor": "neo"},
        "accelerators": [{"sku": "H100", "count": 8, "tier": "committed", "usd_per_hour": 1.85}],
    },
    {"kind": "Secret", "name": "token", "value": "abc"},
    {
        "kind": "Profile",
        "name": "llama-h100",
        "model": "llama",
        "sku": "H100",
        "accelerators_per_replica": 8,
        "engine": "vllm",
        "prefill_tokens_per_s": 15000,
        "decode_step": {"base_s": 0.028, "per_sequence_s": 0.00035},
        "batch_max": 128,
        "kv_tokens": 1200000,
        "concurrency": 32,
        "units": 3.2,
    },
    {
        "kind": "Deployment",
        "name": "llama-us",
        "cluster": "home",
        "models": [{"name": "llama", "upstream_name": "meta/llama"}],
        "engine": "vllm",
        "url": "https://10.1.2.3:8443/v1",
        "credential": {"secret": "token"},
        "replicas": {"committed": 4, "elastic_max": 8},
        "capacity": {"concurrency": 64, "units": 12.5},
        "accelerator": {"sku": "H100", "count": 8},
        "profile": "llama-h100",
    },
    {
        "kind": "Deployment",
        "name": "llama-eu",
        "region": "eu-west",
        "labels": {"jurisdiction": "eu"},
        "models": [{"name": "llama"}],
        "engine": "sglang",
        "urls": ["http://10.1.2.4/v1", "http://10.1.2.5/v1/"],
        "price": {"usd_per_mtok_input": 1, "usd_per_mtok_output": 2},
    },
    {
        "kind": "Gateway",
        "name": "chat",
        "domain": "example.com",
        "protocol": "openai",
        "strategy": "overflow",
        "upstreams": [{"deployment": "llama-us"}, {"deployment": "llama-eu", "rank": 2}],
        "slo": {"ttft_s": 2},
        "resilience": {"hedge": False, "resume": "auto"},
        "default": True,
    },
]
EVERY_KIND: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "x" * 300,
    [],
    [[]],
    {},
    {"x": {}},
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("store") / "fleetgate.db")
    database.migrate()
    yield database
    database.close()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside a value."""
    if type(value) is dict:
        for key in value:
            yield (*path, key)
            yield from places(value[key], (*path, key))
    elif type(value) is list:
        for index, item in enumerate(value):
            yield (*path, index)
            yield from places(item, (*path, index))


@st.composite
def broken_fleets(draw: st.DrawFn) -> list[Any]:
    """The good fleet with a few things replaced, removed, added or repeated."""
    documents: list[Any] = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(places(documents))))
        *parents, last = path
        inside: Any = documents
        for step in parents:
            inside = inside[step]
        match draw(st.sampled_from(["replace", "remove", "add", "repeat"])):
            case "replace":
                inside[last] = draw(JSON)
            case "remove":
                del inside[last]
            case "add" if type(inside) is dict:
                inside[draw(st.text(max_size=10))] = draw(JSON)
            case _ if type(inside) is list:
                inside.append(copy.deepcopy(inside[last]))
        if not documents:
            break
    return documents


def everything(database: Database) -> object:
    with database.read() as connection:
        return rows.load_resources(connection), rows.load_keys(connection), rows.load_events(connection, 0, 1000)


@given(st.lists(JSON, max_size=4))
def test_no_value_upsets_the_parser(values: list[Any]) -> None:
    _, problems = parse_documents(values)
    assert len(problems) >= len(values)
    for problem in problems:
        assert problem.message
        assert problem.fix
        assert problem.sentence("f.yaml").isprintable()


@pytest.mark.parametrize("stored", [False, True])
def test_any_value_in_any_place_is_refused_or_accepted_but_never_a_crash(stored: bool) -> None:
    """Every place of the good fleet, each with a value of every kind."""
    world: rows.StoredResources = {}
    if stored:
        for good in GOOD:
            document = {field: value for field, value in good.items() if field != "value"}
            world[(good["kind"], good["name"])] = rows.StoredResource(
                good["kind"], good["name"], document, 1, False, 0.0, 0.0
            )
    for path in list(places(GOOD)):
        for value in EVERY_KIND:
            documents: Any = copy.deepcopy(GOOD)
            inside = documents
            for step in path[:-1]:
                inside = inside[step]
            inside[path[-1]] = value
            drafts, problems = find_problems(documents, world, CONFIG)
            assert problems or all(draft.resource is not None for draft in drafts)
            find_problems([documents[path[0]]], world, API)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(broken_fleets())
def test_a_fleet_is_applied_whole_or_not_at_all(tmp_path: Path, database: Database, documents: list[Any]) -> None:
    changes = ResourceWriter(database, open_data_dir(tmp_path), ())
    before = everything(database)
    try:
        checked = asyncio.run(changes.check(documents, CONFIG))
        results = changes.apply(checked, CONFIG)
    except ResourceRefused as refused:
        assert everything(database) == before
        assert refused.problems
        for problem in refused.problems:
            assert problem.message
            assert problem.fix
            assert 0 <= problem.document < max(1, len(documents))
        return
    assert len(results) == len(documents)
    data_dir = open_data_dir(tmp_path)
    publisher = Publisher(database, data_dir, (), dict)
    publisher.publish()
    snapshot = decode_snapshot(verified(data_dir.snapshot.read_bytes(), public_key(data_dir.signing_key)))
    for gateway in snapshot.gateways:
        model_routes(gateway, snapshot, "us-east")
    assert not publisher.publish(), "nothing changed, but it was published again"
    again = changes.apply(asyncio.run(changes.check(documents, CONFIG)), CONFIG)
    assert {result.outcome for result in again} <= {"unchanged"}


@given(st.permutations(GOOD))
def test_the_order_of_documents_does_not_matter(documents: list[Any]) -> None:
    assert find_problems(documents, {}, CONFIG)[1] == []


@given(st.lists(st.sampled_from(range(len(GOOD))), unique=True, min_size=1))
def test_what_is_left_out_is_named_where_it_is_used(kept: list[int]) -> None:
    documents = [GOOD[index] for index in kept]
    names = {(document["kind"], document["name"]) for document in documents}
    uses = {
        ("Deployment", "llama-us"): [("Cluster", "home"), ("Secret", "token"), ("Profile", "llama-h100")],
        ("Gateway", "chat"): [("Deployment", "llama-us"), ("Deployment", "llama-eu")],
    }
    expected = {
        (f"{user[0]}/{user[1]}", f"there is no {used[0]} {used[1]!r}")
        for user, all_used in uses.items()
        if user in names
        for used in all_used
        if used not in names
    }
    problems = find_problems(documents, {}, API)[1]
    assert {(problem.path.split(":")[0], problem.message) for problem in problems} == expected
