"""The decision of a set of policies: candidates, preference, priority, and the effect of a failure."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest

from fleetgate.core.model import Deployment, Key, Policy
from fleetgate.core.routing.policy_decision import ALLOWED, PolicyDecision, PythonPolicy, RequestAttributes
from fleetgate.policies import plugins
from fleetgate.policies.body_fields import BodyReader
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.proxy.downstream.policy_filter import PolicyNotices
from tests.unit.policies.rig import BARE, LABELLED, compiled, key, policies, policy

EU_STAYS = policy(when='key.labels.jurisdiction == "eu"', require='deployment.labels.jurisdiction == "eu"')
ANY = RequestAttributes(model="m")


def test_without_policies_everything_is_allowed() -> None:
    assert policies().evaluate(ANY, key()) is ALLOWED


def test_require_applies_to_requests_that_match_when() -> None:
    compiled_set = policies(EU_STAYS)
    assert compiled_set.evaluate(ANY, key("eu", jurisdiction="eu")).allowed == frozenset({LABELLED.slot})
    assert compiled_set.evaluate(ANY, key("us", jurisdiction="us")).allowed is None
    assert compiled_set.evaluate(ANY, key("none")).allowed is None


def test_an_empty_set_is_denied_by_name() -> None:
    decision = policies(policy(require='deployment.region == "mars"')).evaluate(ANY, key())
    assert (decision.allowed, decision.denied_by) == (frozenset(), "p0")
    assert decision.denial == "the policy p0 leaves no Deployment for this request"


def test_a_request_is_denied_if_no_remaining_deployment_serves_the_model() -> None:
    compiled_set = policies(policy(require='deployment.name == "bare"'))
    assert compiled_set.evaluate(RequestAttributes(model="m"), key()).allowed == frozenset({BARE.slot})
    assert compiled_set.evaluate(RequestAttributes(model="n"), key()).denied_by == "p0"


def test_policies_that_deny_only_together_are_all_named() -> None:
    both = policies(policy(require='deployment.name == "bare"'), policy(require='deployment.name == "labelled"'))
    denied = both.evaluate(ANY, key())
    assert denied.denied_by == "p0, p1" and denied.denial.startswith("the policies p0, p1 leave no")


def test_when_of_a_require_may_read_the_deployment() -> None:
    compiled_set = policies(policy(when='deployment.tier == "spot"', require='key.labels.batch == "yes"'))
    assert compiled_set.evaluate(ANY, key("batch", batch="yes")).allowed is None
    assert compiled_set.evaluate(ANY, key("other")).allowed == frozenset({BARE.slot})


def test_prefer_keeps_the_order_of_policies_and_drops_deployments_that_are_not_allowed() -> None:
    long, all_of = policy(when="request.prompt_tokens > 8000", prefer=("bare",)), policy(prefer=("labelled", "bare"))
    compiled_set = policies(long, all_of)
    assert compiled_set.evaluate(RequestAttributes(model="m", prompt_tokens=9000), key()).preferred == (
        BARE.slot,
        LABELLED.slot,
    )
    assert compiled_set.evaluate(RequestAttributes(model="m", prompt_tokens=10), key()).preferred == (
        LABELLED.slot,
        BARE.slot,
    )
    narrowed = policies(long, all_of, EU_STAYS).evaluate(
        RequestAttributes(model="m", prompt_tokens=9000), key(jurisdiction="eu")
    )
    assert narrowed.preferred == (LABELLED.slot,)


def test_the_least_urgent_priority_wins() -> None:
    urgent = policy(when='key.labels.tier == "gold"', priority="critical")
    batch = policy(when='request.body.service_tier == "flex"', priority="sheddable")
    flex = RequestAttributes(model="m", body={("service_tier",): "flex"})
    for ordered in permutations((urgent, batch)):
        compiled_set = policies(*ordered)
        assert compiled_set.evaluate(flex, key("gold", tier="gold")).priority == "sheddable"
        assert compiled_set.evaluate(ANY, key("gold", tier="gold")).priority == "critical"
        assert compiled_set.evaluate(ANY, key()).priority is None


def test_one_policy_may_have_several_effects() -> None:
    decision = policies(
        policy(require='deployment.name == "labelled"', prefer=("labelled",), priority="critical")
    ).evaluate(ANY, key())
    assert decision == PolicyDecision(
        allowed=frozenset({LABELLED.slot}), preferred=(LABELLED.slot,), priority="critical"
    )


FAILS = 'int(request.headers["x-n"]) > 3'
WRONG = RequestAttributes(model="m", headers={"x-n": "many"})


def test_a_require_that_fails_refuses() -> None:
    for broken in (policy(require=FAILS), policy(when=FAILS, require="true")):
        decision = policies(broken).evaluate(WRONG, key())
        assert (
            decision.denied_by == "p0"
            and "the request is refused" in decision.notes[0]
            and "many" not in decision.notes[0]
        )


def test_prefer_and_set_that_fail_are_skipped_and_the_others_apply() -> None:
    both = policies(policy(when=FAILS, prefer=("bare",), priority="sheddable"), policy(priority="critical"))
    decision = both.evaluate(WRONG, key())
    assert (decision.preferred, decision.priority, decision.denied_by) == ((), "critical", "")
    assert decision.notes == (
        "policy p0: `when` cannot be evaluated: a value cannot be converted or has another type than the expression "
        "needs; the policy is skipped",
    )


def test_a_require_that_fails_for_some_deployments_removes_them() -> None:
    decision = policies(policy(require="int(deployment.labels.zone) >= 0")).evaluate(ANY, key())
    assert decision.allowed == frozenset({BARE.slot}) and "those Deployments are left out" in decision.notes[0]


def test_a_changed_key_is_evaluated_again() -> None:
    compiled_set = policies(EU_STAYS)
    assert compiled_set.evaluate(ANY, key("k")).allowed is None
    assert compiled_set.evaluate(ANY, key("k", jurisdiction="eu")).allowed == frozenset({LABELLED.slot})


def test_a_cached_outcome_is_used_only_for_equal_values() -> None:
    compiled_set = policies(
        policy(require='request.headers.a == "x" && request.headers.b == "y" && request.body.n == "1"')
    )
    right: dict[str, Any] = {"headers": {"a": "x", "b": "y"}, "body": {("n",): "1"}}
    swapped = {"headers": {"a": "y", "b": "x"}}
    for more, matches in (({}, True), (swapped, False), ({"body": {("n",): 1}}, False), ({}, True)):
        assert bool(compiled_set.evaluate(RequestAttributes(model="m", **(right | more)), key()).denied_by) != matches


def test_an_expression_that_no_longer_compiles_refuses_only_for_require() -> None:
    decision = compiled(Policy(name="old", require="request.gone == 1")).evaluate(ANY, key())
    assert decision.denied_by == "old" and "every request is refused" in decision.notes[0]
    decision = compiled(Policy(name="old", when="request.gone == 1", priority="critical")).evaluate(ANY, key())
    assert not decision.denied_by and decision.priority is None and "the policy is skipped" in decision.notes[0]


def test_a_note_is_logged_once_a_minute() -> None:
    decision = policies(policy(require=FAILS)).evaluate(WRONG, key()).notes
    notices = PolicyNotices()
    assert notices.fresh(decision, 5.0) == decision
    assert notices.fresh((*decision, "another"), 64.0) == ("another",)
    assert notices.fresh(decision, 65.0) == decision


class TestPythonPolicies:
    """Policies that a plug-in provides."""

    def evaluate(self, monkeypatch: pytest.MonkeyPatch, python: PythonPolicy, when: str = "") -> PolicyDecision:
        monkeypatch.setattr(plugins, "_policies", {})
        plugins.register_policy("mine", python)
        return compiled(Policy(name="p", python="mine", when=when)).evaluate(
            RequestAttributes(model="m", prompt_tokens=5), key()
        )

    def test_it_gets_the_request_the_key_and_the_deployments_of_the_gateway(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cheapest(attributes: RequestAttributes, key: Key, deployments: Sequence[Deployment]) -> PolicyDecision:
            assert attributes.prompt_tokens == 5 and key.name == "laptop"
            return PolicyDecision(
                allowed=frozenset(d.slot for d in deployments if d.name != "bare") | {99},
                preferred=(99, *(d.slot for d in deployments)),
                priority="sheddable",
            )

        decision = self.evaluate(monkeypatch, cheapest)
        assert decision == PolicyDecision(
            allowed=frozenset({LABELLED.slot}), preferred=(LABELLED.slot,), priority="sheddable"
        )

    def test_it_may_deny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decision = self.evaluate(monkeypatch, lambda attributes, key, deployments: PolicyDecision(denied_by="me"))
        assert decision.denied_by == "p"

    def test_it_is_not_called_if_when_does_not_match(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decision = self.evaluate(monkeypatch, lambda *_: PolicyDecision(denied_by="me"), when='key.name == "other"')
        assert decision == ALLOWED

    @pytest.mark.parametrize("result", [None, PolicyDecision(priority="urgent"), "yes"])
    def test_one_that_fails_refuses(self, monkeypatch: pytest.MonkeyPatch, result: object) -> None:
        decision = self.evaluate(monkeypatch, lambda *_: result)  # type: ignore[arg-type]
        assert decision.denied_by == "p" and "Python policy mine failed with" in decision.notes[0]

    def test_it_declares_the_headers_and_fields_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def by_user(attributes: RequestAttributes, key: Key, deployments: Sequence[Deployment]) -> PolicyDecision:
            return PolicyDecision()

        by_user.needs_headers = ("x-user",)  # type: ignore[attr-defined]
        by_user.needs_body = (("user",),)  # type: ignore[attr-defined]
        monkeypatch.setattr(plugins, "_policies", {"mine": by_user})
        compiled_set = compiled(Policy(name="p", python="mine"))
        assert (compiled_set.needs_headers, compiled_set.needs_body) == ((b"x-user",), (("user",),))

    def test_one_that_is_not_installed_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "_policies", {})
        decision = compiled(Policy(name="p", python="gone")).evaluate(ANY, key())
        assert decision.denied_by == "p" and "Python policy gone is not installed" in decision.notes[0]


class TestBody:
    """Reading paths out of a body."""

    def test_it_reads_only_named_paths_that_exist(self) -> None:
        reader = BodyReader([("a",), ("b", "c"), ("m", 1, "role"), ("x y",), ("absent",), ("a", "deep"), ("m", 9)])
        body = b'{"a": 1, "b": {"c": null}, "m": [{}, {"role": "user"}], "x y": "z", "other": [1, 2]}'
        assert reader.read(body) == {("a",): 1, ("m", 1, "role"): "user", ("x y",): "z"}

    def test_the_last_of_a_key_given_twice_counts_as_it_does_for_engines(self) -> None:
        assert BodyReader([("a",)]).read(b'{"a": 1, "a": 2}') == {("a",): 2}

    @pytest.mark.parametrize("body", [b"", b"[1]", b'{"a": tru}', b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000])
    def test_an_invalid_body_is_refused(self, body: bytes) -> None:
        with pytest.raises(InvalidBody):
            BodyReader([("a",)]).read(body)
