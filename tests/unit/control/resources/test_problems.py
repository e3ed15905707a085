"""One mistake, one message: its place, what is wrong, and the way to mend it."""

from typing import Any

import pytest

from fleetgate.control.resources.apply import API, CONFIG, find_problems
from fleetgate.control.resources.problems import path_of

CLUSTER: dict[str, Any] = {"kind": "Cluster", "name": "home", "provider": "local", "region": "us-east"}
DEPLOYMENT: dict[str, Any] = {
    "kind": "Deployment",
    "name": "llama",
    "cluster": "home",
    "models": [{"name": "m"}],
    "engine": "vllm",
    "url": "https://10.0.0.1/v1",
}
MANAGED: dict[str, Any] = {
    **{field: value for field, value in DEPLOYMENT.items() if field != "url"},
    "name": "own",
    "workload": {"command": ["serve", "--port", "{port}"]},
}
GATEWAY: dict[str, Any] = {
    "kind": "Gateway",
    "name": "chat",
    "domain": "example.com",
    "protocol": "openai",
    "strategy": "overflow",
    "upstreams": [{"deployment": "llama"}],
}
KEY: dict[str, Any] = {"kind": "Key", "name": "app", "gateways": ["chat"]}
PROFILE: dict[str, Any] = {
    "kind": "Profile",
    "name": "p1",
    "model": "m",
    "sku": "H100",
    "accelerators_per_replica": 1,
    "engine": "vllm",
    "prefill_tokens_per_s": 15000,
    "decode_step": {"base_s": 0.028, "per_sequence_s": 0.00035},
}
FLEET = (CLUSTER, DEPLOYMENT, MANAGED, GATEWAY, KEY, PROFILE)


def mistakes(changed: dict[str, Any], **fields: Any) -> list[str]:
    documents = [
        {name: value for name, value in {**document, **fields}.items() if value is not ...}
        if document is changed
        else document
        for document in FLEET
    ]
    return [problem.sentence() for problem in find_problems(documents, {}, API)[1]]


def test_the_fleet_itself_has_none() -> None:
    assert mistakes(CLUSTER) == []


@pytest.mark.parametrize(
    ("document", "fields", "start", "has"),
    [
        (GATEWAY, {"domain": ..., "domian": "example.com"}, "Gateway/chat: domian: is not", "did you mean `domain`?"),
        (GATEWAY, {"domain": ...}, "Gateway/chat: domain: is missing", "add `domain:`"),
        (GATEWAY, {"domain": "https://example.com"}, "Gateway/chat: domain:", "without scheme"),
        (GATEWAY, {"domain": "example.com."}, "Gateway/chat: domain:", "trailing dot"),
        (GATEWAY, {"strategy": "overflw"}, "Gateway/chat: strategy:", "capacity_round_robin, "),
        (GATEWAY, {"protocol": "anthropic"}, "Gateway/chat: protocol:", "later release"),
        (GATEWAY, {"protocol": "grpc"}, "Gateway/chat: protocol:", "use openai"),
        (GATEWAY, {"policies": [{"name": "a"}]}, "Gateway/chat: policies[0]:", "policy a does nothing"),
        (GATEWAY, {"resilience": {"hedge": "auto"}}, "Gateway/chat: resilience.hedge:", "off, critical, all"),
        (GATEWAY, {"resilience": {"hedge": True}}, "Gateway/chat: resilience.hedge:", "off, critical, all"),
        (GATEWAY, {"resilience": {"attempts_max": 0}}, "Gateway/chat: resilience.attempts_max:", "at least 1"),
        (GATEWAY, {"overflow_at": 1.5}, "Gateway/chat: overflow_at:", "at most 1"),
        (GATEWAY, {"admission": {"queue_max": -1}}, "Gateway/chat: admission.queue_max:", "at least 0"),
        (GATEWAY, {"admission": {"queue_max": "9"}}, "Gateway/chat: admission.queue_max:", "a whole number"),
        (GATEWAY, {"locality": "on"}, "Gateway/chat: locality:", "prefer, ignore"),
        (GATEWAY, {"upstreams": []}, "Gateway/chat: upstreams: is empty", "at least one"),
        (GATEWAY, {"upstreams": [{"deployment": "lama"}]}, "Gateway/chat: upstreams[0].deployment:", "`llama`"),
        (
            GATEWAY,
            {"upstreams": [{"deployment": "llama"}, {"deployment": "llama"}]},
            "Gateway/chat: upstreams[1].deployment:",
            "2 times",
        ),
        (DEPLOYMENT, {"url": ...}, "Deployment/llama: url: is missing", "`workload:`"),
        (DEPLOYMENT, {"url": "10.0.0.1:80/v1"}, "Deployment/llama: url:", "https://"),
        (DEPLOYMENT, {"url": "https://a:b@h/v1"}, "Deployment/llama: url:", "Secret"),
        (DEPLOYMENT, {"url": "https://h/v1?key=1"}, "Deployment/llama: url:", "query"),
        (DEPLOYMENT, {"url": "https://h/v1#x"}, "Deployment/llama: url:", "fragment"),
        (DEPLOYMENT, {"url": "https://h:0/v1"}, "Deployment/llama: url:", "port"),
        (DEPLOYMENT, {"url": "https://h:99999/v1"}, "Deployment/llama: url:", "port"),
        (DEPLOYMENT, {"url": "https://h/v1/../x"}, "Deployment/llama: url:", "path"),
        (DEPLOYMENT, {"url": "https://h/v1\r\nx: y"}, "Deployment/llama: url:", "characters"),
        (DEPLOYMENT, {"url": "https:///v1"}, "Deployment/llama: url:", "host"),
        (DEPLOYMENT, {"urls": ["https://h/v1"]}, "Deployment/llama: urls:", "keep one"),
        (
            DEPLOYMENT,
            {"url": ..., "urls": ["https://h/v1", "https://H:443/v1/"]},
            "Deployment/llama: urls[1]:",
            "2 times",
        ),
        (DEPLOYMENT, {"cluster": "hoome"}, "Deployment/llama: cluster:", "did you mean `home`?"),
        (DEPLOYMENT, {"cluster": ...}, "Deployment/llama: region: is missing", "`cluster:`"),
        (DEPLOYMENT, {"credential": {"secret": "none"}}, "Deployment/llama: credential.secret:", "add a Secret"),
        (DEPLOYMENT, {"models": []}, "Deployment/llama: models: is empty", "at least one"),
        (DEPLOYMENT, {"models": [{"name": "m"}, {"name": "m"}]}, "Deployment/llama: models[1]:", "2 times"),
        (DEPLOYMENT, {"models": [{"nme": "m"}]}, "Deployment/llama: models[0].nme:", "did you mean `name`?"),
        (DEPLOYMENT, {"engine": "vlm"}, "Deployment/llama: engine:", "did you mean `vllm`?"),
        (DEPLOYMENT, {"profile": "p"}, "Deployment/llama: profile: there is no Profile", "did you mean `p1`?"),
        (DEPLOYMENT, {"profile": "p1", "models": [{"name": "x"}]}, "Deployment/llama: profile:", "does not serve"),
        (DEPLOYMENT, {"profile": "p1", "accelerator": {"sku": "L4"}}, "Deployment/llama: profile:", "calibrate llama"),
        (
            DEPLOYMENT,
            {"profile": "p1", "accelerator": {"sku": "H100"}, "engine": "sglang"},
            "Deployment/llama: profile:",
            "engine 'vllm', but the Deployment has 'sglang'",
        ),
        (
            DEPLOYMENT,
            {"url": ..., "urls": ["https://h/v1", "https://i/v1"], "replicas": {"committed": 3}},
            "Deployment/llama: replicas.committed:",
            "2 urls",
        ),
        (PROFILE, {"sku": ...}, "Profile/p1: sku: is missing", "`sku:`"),
        (PROFILE, {"prefill_tokens_per_s": 0}, "Profile/p1: prefill_tokens_per_s:", "at least"),
        (
            PROFILE,
            {"decode_step": {"base_s": 0, "per_sequence_s": 0}},
            "Profile/p1: decode_step.base_s:",
            "more than 0",
        ),
        (PROFILE, {"decode_step": {"base_s": 0.1}}, "Profile/p1: decode_step.per_sequence_s:", "missing"),
        (PROFILE, {"batch_max": 0}, "Profile/p1: batch_max:", "at least 1"),
        (PROFILE, {"units": 0}, "Profile/p1: units:", "more than 0"),
        (DEPLOYMENT, {"capacity": {"units": 0}}, "Deployment/llama: capacity.units:", "more than 0"),
        (DEPLOYMENT, {"labels": {"a": 1}}, "Deployment/llama: labels.a:", "in quotes"),
        (
            DEPLOYMENT,
            {"price": {"usd_per_hour": 1.0, "usd_per_mtok_input": 1.0}},
            "Deployment/llama: price:",
            "by the hour",
        ),
        (MANAGED, {"workload": {"image": "x", "command": ["a"]}}, "Deployment/own: workload.image:", "no images"),
        (MANAGED, {"workload": {}}, "Deployment/own: workload.command: is missing", "give the command"),
        (MANAGED, {"workload": {"command": "serve"}}, "Deployment/own: workload.command:", "a list"),
        (MANAGED, {"cluster": ..., "region": "r"}, "Deployment/own: cluster: is missing", "name the Cluster"),
        (CLUSTER, {"provider": "skypilot"}, "Deployment/own: workload:", "provider local"),
        (CLUSTER, {"provider": "aws"}, "Cluster/home: provider:", "kubernetes"),
        (KEY, {"gateways": ["chats"]}, "Key/app: gateways[0]:", "did you mean `chat`?"),
        (KEY, {"rpm": 5}, "Key/app: rpm:", "later release"),
        (KEY, {"expires": "soon"}, "Key/app: expires:", "30d"),
        (KEY, {"name": "App"}, "Key/App: name:", "a-z"),
        (KEY, {"name": "x" * 64}, "Key/xxx", "63"),
        (KEY, {"kind": "Keys"}, "Keys/app: kind:", "did you mean `Key`?"),
        (KEY, {"kind": "Policy"}, "Policy/app: kind:", "part of a Gateway"),
        (KEY, {"kind": "Event"}, "Event/app: kind:", "only Fleetgate writes Events"),
        (KEY, {"kind": ...}, "document 5: kind: is missing", "Gateway"),
        (KEY, {"name": ...}, "document 5 (Key): name: is missing", "`name:`"),
    ],
)
def test_one_mistake_is_one_message(document: dict[str, Any], fields: dict[str, Any], start: str, has: str) -> None:
    found = mistakes(document, **fields)
    assert len(found) == 1, found
    assert found[0].startswith(start)
    assert has in found[0]


def test_names_and_defaults_are_unique_in_a_file() -> None:
    twice = find_problems([CLUSTER, CLUSTER], {}, API)[1]
    assert [problem.path for problem in twice] == ["Cluster/home: name"]
    gateways = [{**GATEWAY, "default": True}, {**GATEWAY, "name": "other", "default": True}]
    defaults = find_problems([*FLEET[:3], *gateways], {}, API)[1]
    assert {problem.path for problem in defaults} == {"Gateway/chat: default", "Gateway/other: default"}


def test_a_config_file_has_its_own_mistakes() -> None:
    documents = [
        {**CLUSTER, "generation": 3},
        {**DEPLOYMENT, "url": "http://0xa9fea9fe/v1"},
        {"kind": "Key", "name": "k"},
    ]
    found = [problem.sentence() for problem in find_problems(documents, {}, CONFIG)[1]]
    assert [sentence.split(": ")[:2] for sentence in found] == [
        ["Cluster/home", "generation"],
        ["Deployment/llama", "url"],
        [
            "Key/k",
            "a --config file cannot create a Key, because nothing receives its token; run `fleetgate keys create k`",
        ],
    ]


def test_text_that_is_no_text_is_refused_and_told_as_an_escape() -> None:
    lone = "\ud800"
    for document in (
        {**CLUSTER, "region": lone},
        {**CLUSTER, "labels": {lone: "x"}},
        {**CLUSTER, lone: 1},
        {**CLUSTER, "name": lone},
        {"kind": lone, "name": "a"},
        {**DEPLOYMENT, "cluster": lone},
        {**DEPLOYMENT, "models": [{"name": lone}], "url": f"http://{lone}/v1"},
    ):
        problems = find_problems([CLUSTER, document] if document["kind"] == "Deployment" else [document], {}, API)[1]
        assert problems
        for problem in problems:
            problem.sentence().encode()


def test_secrets_are_never_repeated_in_messages() -> None:
    canary = "c4nary-value"
    for document in (
        {"kind": "Secret", "name": "s", "value": canary + "\n"},
        {"kind": "Secret", "name": "s", "value": [canary]},
        {"kind": "Secret", "name": "s", "value": canary, "valeu": canary},
    ):
        problems = find_problems([document], {}, API)[1]
        assert problems
        assert not [problem for problem in problems if canary in problem.sentence()]


def test_paths_read_like_the_file() -> None:
    assert path_of(("models", 0, "name")) == "models[0].name"
    assert path_of(("a", "b", 1, 2)) == "a.b[1][2]"
    assert path_of(("a\x1b[2J",)) == "a\\x1b[2J"
