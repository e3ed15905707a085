"""What a set of policies says of requests: candidates, preference, priority, and what happens when one fails."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest

from fleetgate.core.model import Deployment, Key, Policy
from fleetgate.core.routing.policy_decision import ALLOWED, PolicyDecision, PythonPolicy, RequestAttributes
from fleetgate.policies import plugins
from fleetgate.policies.body_fields import BodyReader
from fleetgate.protocols.json_members import InvalidBody
from fleetgate.proxy.downstream.policy_notices import PolicyNotices
from tests.unit.rules_rig import BARE, RICH, compiled, key, policy, rules

EU_STAYS = policy(when='key.labels.jurisdiction == "eu"', require='deployment.labels.jurisdiction == "eu"')
ANY = RequestAttributes(model="m")


def test_without_policies_everything_is_allowed() -> None:
    assert rules().judge(ANY, key()) is ALLOWED


def test_require_narrows_for_those_whom_when_names() -> None:
    ruleset = rules(EU_STAYS)
    assert ruleset.judge(ANY, key("eu", jurisdiction="eu")).allowed == frozenset({RICH.slot})
    assert ruleset.judge(ANY, key("us", jurisdiction="us")).allowed is None
    assert ruleset.judge(ANY, key("none")).allowed is None


def test_an_empty_set_is_denied_by_name() -> None:
    told = rules(policy(require='deployment.region == "mars"')).judge(ANY, key())
    assert (told.allowed, told.denied_by) == (frozenset(), "p0")
    assert told.denial == "the policy p0 leaves no Deployment for this request"


def test_the_set_is_empty_too_when_nobody_left_serves_the_model() -> None:
    ruleset = rules(policy(require='deployment.name == "bare"'))
    assert ruleset.judge(RequestAttributes(model="m"), key()).allowed == frozenset({BARE.slot})
    assert ruleset.judge(RequestAttributes(model="n"), key()).denied_by == "p0"


def test_policies_that_leave_nobody_together_are_all_named() -> None:
    told = rules(policy(require='deployment.name == "bare"'), policy(require='deployment.name == "rich"'))
    denied = told.judge(ANY, key())
    assert denied.denied_by == "p0, p1" and denied.denial.startswith("the policies p0, p1 leave no")


def test_when_of_a_require_may_speak_of_the_deployment() -> None:
    ruleset = rules(policy(when='deployment.tier == "spot"', require='key.labels.batch == "yes"'))
    assert ruleset.judge(ANY, key("batch", batch="yes")).allowed is None
    assert ruleset.judge(ANY, key("other")).allowed == frozenset({BARE.slot})


def test_prefer_comes_in_the_order_of_policies_without_who_is_not_allowed() -> None:
    long, all_of = policy(when="request.prompt_tokens > 8000", prefer=("bare",)), policy(prefer=("rich", "bare"))
    ruleset = rules(long, all_of)
    assert ruleset.judge(RequestAttributes(model="m", prompt_tokens=9000), key()).preferred == (BARE.slot, RICH.slot)
    assert ruleset.judge(RequestAttributes(model="m", prompt_tokens=10), key()).preferred == (RICH.slot, BARE.slot)
    narrowed = rules(long, all_of, EU_STAYS).judge(
        RequestAttributes(model="m", prompt_tokens=9000), key(jurisdiction="eu")
    )
    assert narrowed.preferred == (RICH.slot,)


def test_the_least_urgent_priority_holds() -> None:
    urgent = policy(when='key.labels.tier == "gold"', priority="critical")
    batch = policy(when='request.body.service_tier == "flex"', priority="sheddable")
    flex = RequestAttributes(model="m", body={("service_tier",): "flex"})
    for policies in permutations((urgent, batch)):
        ruleset = rules(*policies)
        assert ruleset.judge(flex, key("gold", tier="gold")).priority == "sheddable"
        assert ruleset.judge(ANY, key("gold", tier="gold")).priority == "critical"
        assert ruleset.judge(ANY, key()).priority is None


def test_one_policy_may_do_several_things() -> None:
    told = rules(policy(require='deployment.name == "rich"', prefer=("rich",), priority="critical")).judge(ANY, key())
    assert told == PolicyDecision(allowed=frozenset({RICH.slot}), preferred=(RICH.slot,), priority="critical")


FAILS = 'int(request.headers["x-n"]) > 3'
WRONG = RequestAttributes(model="m", headers={"x-n": "many"})


def test_a_require_that_fails_refuses() -> None:
    for broken in (policy(require=FAILS), policy(when=FAILS, require="true")):
        told = rules(broken).judge(WRONG, key())
        assert told.denied_by == "p0" and "the request is refused" in told.notes[0] and "many" not in told.notes[0]


def test_prefer_and_set_that_fail_are_skipped_and_the_rest_holds() -> None:
    told = rules(policy(when=FAILS, prefer=("bare",), priority="sheddable"), policy(priority="critical"))
    judged = told.judge(WRONG, key())
    assert (judged.preferred, judged.priority, judged.denied_by) == ((), "critical", "")
    assert judged.notes == (
        "policy p0: `when` cannot be evaluated: a value cannot be converted or has another type than the expression "
        "needs; the policy is skipped",
    )


def test_a_require_that_fails_for_some_leaves_those_out() -> None:
    told = rules(policy(require="int(deployment.labels.zone) >= 0")).judge(ANY, key())
    assert told.allowed == frozenset({BARE.slot}) and "those Deployments are left out" in told.notes[0]


def test_what_the_key_decides_is_decided_anew_for_a_changed_key() -> None:
    ruleset = rules(EU_STAYS)
    assert ruleset.judge(ANY, key("k")).allowed is None
    assert ruleset.judge(ANY, key("k", jurisdiction="eu")).allowed == frozenset({RICH.slot})


def test_what_is_remembered_is_never_mistaken_for_something_else() -> None:
    ruleset = rules(policy(require='request.headers.a == "x" && request.headers.b == "y" && request.body.n == "1"'))
    right: dict[str, Any] = {"headers": {"a": "x", "b": "y"}, "body": {("n",): "1"}}
    swapped = {"headers": {"a": "y", "b": "x"}}
    for more, holds in (({}, True), (swapped, False), ({"body": {("n",): 1}}, False), ({}, True)):
        assert bool(ruleset.judge(RequestAttributes(model="m", **(right | more)), key()).denied_by) != holds


def test_an_expression_that_no_longer_compiles_refuses_only_where_it_protects() -> None:
    told = compiled(Policy(name="old", require="request.gone == 1")).judge(ANY, key())
    assert told.denied_by == "old" and "every request is refused" in told.notes[0]
    told = compiled(Policy(name="old", when="request.gone == 1", priority="critical")).judge(ANY, key())
    assert not told.denied_by and told.priority is None and "the policy is skipped" in told.notes[0]


def test_a_note_is_told_once_a_minute() -> None:
    told = rules(policy(require=FAILS)).judge(WRONG, key()).notes
    notices = PolicyNotices()
    assert notices.fresh(told, 5.0) == told
    assert notices.fresh((*told, "another"), 64.0) == ("another",)
    assert notices.fresh(told, 65.0) == told


class TestInPython:
    """Policies that a plug-in brings."""

    def judge(self, monkeypatch: pytest.MonkeyPatch, python: PythonPolicy, when: str = "") -> PolicyDecision:
        monkeypatch.setattr(plugins, "_policies", {})
        plugins.register_policy("mine", python)
        return compiled(Policy(name="p", python="mine", when=when)).judge(
            RequestAttributes(model="m", prompt_tokens=5), key()
        )

    def test_it_sees_the_request_the_key_and_the_gateways_deployments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def cheapest(facts: RequestAttributes, key: Key, deployments: Sequence[Deployment]) -> PolicyDecision:
            assert facts.prompt_tokens == 5 and key.name == "laptop"
            return PolicyDecision(
                allowed=frozenset(d.slot for d in deployments if d.name != "bare") | {99},
                preferred=(99, *(d.slot for d in deployments)),
                priority="sheddable",
            )

        told = self.judge(monkeypatch, cheapest)
        assert told == PolicyDecision(allowed=frozenset({RICH.slot}), preferred=(RICH.slot,), priority="sheddable")

    def test_it_may_deny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = self.judge(monkeypatch, lambda facts, key, deployments: PolicyDecision(denied_by="me"))
        assert told.denied_by == "p"

    def test_when_keeps_it_from_being_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = self.judge(monkeypatch, lambda *_: PolicyDecision(denied_by="me"), when='key.name == "nobody"')
        assert told == ALLOWED

    @pytest.mark.parametrize("answer", [None, PolicyDecision(priority="urgent"), "yes"])
    def test_one_that_fails_refuses(self, monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
        told = self.judge(monkeypatch, lambda *_: answer)  # type: ignore[arg-type]
        assert told.denied_by == "p" and "Python policy mine failed with" in told.notes[0]

    def test_it_says_what_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def by_user(facts: RequestAttributes, key: Key, deployments: Sequence[Deployment]) -> PolicyDecision:
            return PolicyDecision()

        by_user.needs_headers = ("x-user",)  # type: ignore[attr-defined]
        by_user.needs_body = (("user",),)  # type: ignore[attr-defined]
        monkeypatch.setattr(plugins, "_policies", {"mine": by_user})
        ruleset = compiled(Policy(name="p", python="mine"))
        assert (ruleset.needs_headers, ruleset.needs_body) == ((b"x-user",), (("user",),))

    def test_one_that_is_not_installed_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugins, "_policies", {})
        told = compiled(Policy(name="p", python="gone")).judge(ANY, key())
        assert told.denied_by == "p" and "Python policy gone is not installed" in told.notes[0]


class TestBody:
    """Reading paths out of a body."""

    def test_only_what_is_named_and_there(self) -> None:
        reader = BodyReader([("a",), ("b", "c"), ("m", 1, "role"), ("x y",), ("gone",), ("a", "deep"), ("m", 9)])
        body = b'{"a": 1, "b": {"c": null}, "m": [{}, {"role": "user"}], "x y": "z", "other": [1, 2]}'
        assert reader.read(body) == {("a",): 1, ("m", 1, "role"): "user", ("x y",): "z"}

    def test_the_last_of_a_key_given_twice_counts_as_it_does_for_engines(self) -> None:
        assert BodyReader([("a",)]).read(b'{"a": 1, "a": 2}') == {("a",): 2}

    @pytest.mark.parametrize("body", [b"", b"[1]", b'{"a": tru}', b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000])
    def test_what_cannot_be_read_is_refused(self, body: bytes) -> None:
        with pytest.raises(InvalidBody):
            BodyReader([("a",)]).read(body)
