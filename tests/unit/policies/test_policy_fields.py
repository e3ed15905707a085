"""Policies in a manifest: errors at apply with path and column, and what the Snapshot contains."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetgate.control.resources import references
from fleetgate.control.resources import schema as resources
from fleetgate.control.resources.parser import parse_documents
from fleetgate.control.resources.policy_fields import POLICIES_MAX, STORED
from fleetgate.control.snapshot.builder import gateway_of
from fleetgate.core.model import Policy

DEPLOYMENT = {
    "kind": "Deployment",
    "name": "llama-us",
    "region": "us-east",
    "engine": "vllm",
    "url": "http://127.0.0.1:9/v1",
    "models": [{"name": "m"}],
}
EU_STAYS = {
    "name": "eu-stays-in-eu",
    "when": 'key.labels.jurisdiction == "eu"',
    "require": 'deployment.labels.jurisdiction == "eu"',
}


def gateway(*policies: Any) -> dict[str, Any]:
    return {
        "kind": "Gateway",
        "name": "chat",
        "domain": "example.com",
        "protocol": "openai",
        "strategy": "overflow",
        "upstreams": [{"deployment": "llama-us"}],
        "policies": list(policies),
    }


def errors(*policies: Any) -> list[str]:
    drafts, problems = parse_documents([DEPLOYMENT, gateway(*policies)])
    return [problem.sentence() for problem in [*problems, *references.check(drafts, {})]]


@pytest.mark.parametrize(
    ("policy", "path", "part"),
    [
        (EU_STAYS | {"when": "key.label.x == 'a'"}, "policies[1].when: at column 5:", "did you mean `key.labels`?"),
        (EU_STAYS | {"require": "deployment.regon"}, "policies[1].require: at column 12:", "`deployment.region`"),
        (EU_STAYS | {"require": "1 +"}, "policies[1].require: at column 4:", "not complete"),
        (EU_STAYS | {"require": "true\n  && 1"}, "policies[1].require: at line 2 column 6:", "a whole number"),
        (EU_STAYS | {"require": ""}, "policies[1].require: at column 1:", "not complete"),
        (EU_STAYS | {"require": True}, "policies[1].require:", "put it in quotes"),
        (EU_STAYS | {"requires": "true"}, "policies[1].requires:", "did you mean `require`?"),
        (EU_STAYS | {"prefer": ["llama"]}, "policies[1].prefer[0]:", "did you mean `llama-us`?"),
        (EU_STAYS | {"prefer": ["mars"]}, "policies[1].prefer[0]:", "add it to `upstreams:`"),
        (EU_STAYS | {"prefer": []}, "policies[1].prefer:", "at least one"),
        (EU_STAYS | {"set": {"priority": "urgent"}}, "policies[1].set.priority:", "critical, standard, sheddable"),
        (EU_STAYS | {"set": {"prio": "critical"}}, "policies[1].set.prio:", "did you mean `priority`?"),
        (EU_STAYS | {"set": {}}, "policies[1].set.priority:", "missing"),
        (EU_STAYS | {"python": "dice"}, "policies[1].python:", "there is no Python policy 'dice'"),
        (EU_STAYS | {"name": "first"}, "policies[1].name:", "given 2 times"),
        ({"name": "idle", "when": "true"}, "policies[1]:", "policy idle does nothing"),
        ({"when": "true", "require": "true"}, "policies[1].name:", "is missing"),
        (
            {"name": "d", "when": "deployment.tier == 'spot'", "set": {"priority": "critical"}},
            "policies[1].when: at column 1:",
            "with `require:` alone",
        ),
    ],
)
def test_one_error_is_one_message_with_its_position(policy: dict[str, Any], path: str, part: str) -> None:
    found = errors({"name": "first", "require": "true"}, policy)
    assert len(found) == 1, found
    assert found[0].startswith(f"Gateway/chat: {path}") and part in found[0]


def test_the_number_of_policies_is_limited() -> None:
    many = [{"name": f"p{number}", "require": "true"} for number in range(POLICIES_MAX + 1)]
    assert not errors(*many[:-1])
    assert len(errors(*many)) == 1


def test_every_example_of_the_documentation_is_in_the_snapshot() -> None:
    manifest = gateway(
        EU_STAYS,
        {"name": "long-prompts", "when": "request.prompt_tokens > 8000", "prefer": ["llama-us"]},
        {"name": "batch", "when": 'request.body.service_tier == "flex"', "set": {"priority": "sheddable"}},
    )
    assert not errors(*manifest["policies"])
    gateway_value = gateway_of(resources.Gateway.model_validate(manifest), 0)
    assert gateway_value.policies == (
        Policy(**EU_STAYS),  # type: ignore[arg-type]
        Policy(name="long-prompts", when="request.prompt_tokens > 8000", prefer=("llama-us",)),
        Policy(name="batch", when='request.body.service_tier == "flex"', priority="sheddable"),
    )


def test_a_policy_accepted_before_is_still_published() -> None:
    """A plug-in that is not installed any more, or a stricter check, must not block the other resources."""
    manifest = gateway({"name": "old", "python": "gone", "when": "request.gone == 1"})
    assert len(errors(*manifest["policies"])) == 2
    gateway_value = gateway_of(resources.Gateway.model_validate(manifest, context=STORED), 0)
    assert gateway_value.policies == (Policy(name="old", python="gone", when="request.gone == 1"),)


DOCS = Path(__file__).parents[3] / "docs"
BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["reference/policies.md", "howto/write-a-policy.md"])
def test_the_examples_of_the_documentation_are_accepted(page: str) -> None:
    shown = []
    for block in BLOCK.findall((DOCS / page).read_text()):
        read = yaml.safe_load(block)
        shown += read["policies"] if type(read) is dict else read
    assert len(shown) >= 3
    for policy in shown:
        named = [f"prefer[{at}]" for at in range(len(policy.get("prefer", ())))] + ["python"] * ("python" in policy)
        found = errors(policy)
        # The Deployments and plug-ins named on the pages do not exist here.
        assert [error.split(": ")[1] for error in found] == [f"policies[0].{field}" for field in named[::-1]]


def test_the_error_shown_in_the_documentation_is_real() -> None:
    page = " ".join((DOCS / "reference" / "policies.md").read_text().split())
    found = errors(
        {"name": "a", "require": "true"}, {"name": "b", "when": "request.promt_tokens > 1", "require": "true"}
    )
    assert found[0].removeprefix("Gateway/chat: ") in page
