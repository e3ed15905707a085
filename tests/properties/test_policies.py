"""For every request and label, policies decide, and never allow more than their conditions."""

from itertools import permutations
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fleetgate.core.admission.request_queue import PRIORITIES
from fleetgate.core.model import Deployment, Gateway, Key, Policy, Upstream
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.policies import evaluator
from fleetgate.policies.body_fields import BodyReader
from fleetgate.policies.cel_parser import CHARS_MAX, CelError
from fleetgate.policies.policy_set import CompiledPolicies
from fleetgate.policies.type_checker import check

NAMES = ("jurisdiction", "team", "a.b/c")
labels = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["eu", "us", "", "5", "é"]) | st.text(max_size=5))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "a"]), inner, max_size=2),
    max_leaves=6,
)
CONDITIONS = (
    'key.labels.jurisdiction == "eu"',
    "deployment.labels.jurisdiction == key.labels.jurisdiction",
    'deployment.labels["a.b/c"] == "5" || int(deployment.labels.team) > 3',
    'deployment.region.startsWith("e") && deployment.usd_per_hour < 3.0',
    "request.prompt_tokens > 8000 && !request.stream",
    'request.headers["x-team"] == key.labels.team',
    "int(request.headers.n) > 3",
    'request.body.tier == "flex" || request.body.n > 3',
    'request.body.items.exists(m, m.role == "a" || m.a > 2)',
    "request.body.items.all(m, m != null) && size(request.body.tier) < 9",
    '"a" in request.body.items || has(request.body.deep.a)',
    'string(request.body.n) == "1" || double(request.body.n) > 0.5',
    'request.body.tier.matches("^[a-z]{1,9}$") ? request.body.flag : gateway.name == "chat"',
    'request.body["deep"][0].a == request.body.n',
)
PATHS: tuple[Any, ...] = (("tier",), ("n",), ("items",), ("deep", "a"), ("flag",), ("deep", 0, "a"))
conditions = st.sampled_from(CONDITIONS)
policy_fields = st.fixed_dictionaries(
    {},
    optional={
        "when": conditions,
        "require": conditions,
        "prefer": st.lists(st.sampled_from(["d0", "d1", "d2", "d3", "absent"]), max_size=3).map(tuple),
        "priority": st.sampled_from(sorted(PRIORITIES)),
    },
)


def named(name: str, fields: dict[str, Any]) -> Policy:
    return Policy(name=name, **fields)


policies = st.lists(policy_fields, max_size=4).map(
    lambda many: tuple(named(f"p{number}", fields) for number, fields in enumerate(many))
)
attributes = st.builds(
    RequestAttributes,
    model=st.sampled_from(["m", "n", "other"]),
    prompt_tokens=st.integers(0, 10**6),
    stream=st.booleans(),
    headers=st.dictionaries(st.sampled_from(["x-team", "n"]), st.text(max_size=5)),
    body=st.dictionaries(st.sampled_from(PATHS), values),
)
keys = st.builds(Key, id=st.just("k"), name=st.text(max_size=5), secret_hmac=st.just(""), labels=labels)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Deployment, ...]:
    return tuple(
        Deployment(
            slot=slot,
            name=f"d{slot}",
            region=draw(st.sampled_from(["eu", "us"])),
            engine="vllm",
            models=dict.fromkeys(draw(st.sampled_from([("m",), ("m", "n")])), "x"),
            endpoints=(),
            labels=draw(labels),
        )
        for slot in range(draw(st.integers(1, 4)))
    )


def compiled(made: tuple[Policy, ...], fleet: tuple[Deployment, ...]) -> CompiledPolicies:
    upstreams = tuple(Upstream(deployment=deployment.name, rank=1) for deployment in fleet)
    gateway = Gateway(slot=0, name="chat", domain="e", protocol="openai", strategy="overflow", upstreams=upstreams)
    return CompiledPolicies.compile(msgspec.structs.replace(gateway, policies=made), fleet)


def allowed(
    compiled_policies: CompiledPolicies, request: RequestAttributes, key: Key, fleet: tuple[Deployment, ...]
) -> frozenset[int]:
    """The slots that serve the model and may be used."""
    decision = compiled_policies.evaluate(request, key).allowed
    return frozenset(d.slot for d in fleet if request.model in d.models and (decision is None or d.slot in decision))


@given(policies, fleets(), attributes, keys)
def test_a_decision_has_only_deployments_of_the_gateway(
    made: tuple[Policy, ...], fleet: tuple[Deployment, ...], request: RequestAttributes, key: Key
) -> None:
    compiled_policies = compiled(made, fleet)
    decision = compiled_policies.evaluate(request, key)
    slots = {deployment.slot for deployment in fleet}
    assert decision.allowed is None or decision.allowed <= slots
    assert set(decision.preferred) <= (slots if decision.allowed is None else decision.allowed)
    assert len(set(decision.preferred)) == len(decision.preferred)
    assert decision.priority in {None, *PRIORITIES}
    assert bool(decision.denied_by) == (decision.allowed == frozenset())
    assert compiled_policies.evaluate(request, key) == decision, "the cached view of a key changes nothing"


@given(policies, fleets(), attributes, keys, policy_fields)
def test_another_policy_never_widens(
    made: tuple[Policy, ...], fleet: tuple[Deployment, ...], request: RequestAttributes, key: Key, more: dict[str, Any]
) -> None:
    before = allowed(compiled(made, fleet), request, key, fleet)
    after = allowed(compiled((*made, named("more", more)), fleet), request, key, fleet)
    assert after <= before


@given(policies, fleets(), attributes, keys)
def test_the_order_of_policies_only_changes_the_order_of_preference(
    made: tuple[Policy, ...], fleet: tuple[Deployment, ...], request: RequestAttributes, key: Key
) -> None:
    decision = compiled(made, fleet).evaluate(request, key)
    for other in list(permutations(made))[:6]:
        again = compiled(other, fleet).evaluate(request, key)
        assert (again.allowed, again.priority, again.denied_by) == (
            decision.allowed,
            decision.priority,
            decision.denied_by,
        )
        assert set(again.preferred) == set(decision.preferred) and sorted(again.notes) == sorted(decision.notes)


@given(conditions, fleets(), attributes, keys)
def test_an_absent_entry_reads_as_empty(
    condition: str, fleet: tuple[Deployment, ...], request: RequestAttributes, key: Key
) -> None:
    """An entry that is absent, null or an empty text is the same."""
    emptied = msgspec.structs.replace(
        request,
        headers={"x-team": "", "n": "", **request.headers},
        body={**dict.fromkeys(PATHS), **request.body},
    )
    labelled = msgspec.structs.replace(key, labels={**dict.fromkeys(NAMES, ""), **key.labels})
    compiled_policies = compiled((Policy(name="p", require=condition),), fleet)
    assert compiled_policies.evaluate(emptied, labelled) == compiled_policies.evaluate(request, key)


@given(conditions, st.permutations(range(3)), attributes, keys)
def test_equal_deployments_get_equal_decisions(
    condition: str, order: list[int], request: RequestAttributes, key: Key
) -> None:
    twins = tuple(
        Deployment(slot=slot, name=f"d{slot}", region="eu", engine="vllm", models={"m": "m"}, endpoints=())
        for slot in order
    )
    decision = compiled((Policy(name="p", require=condition),), twins).evaluate(request, key).allowed
    assert decision is None or not decision


PRESENT: dict[str, Any] = {
    "request": {
        "model": "llama",
        "stream": True,
        "prompt_tokens": 9000,
        "headers": {"x-team": "a"},
        "body": {"n": 5, "f": 0.5, "tier": "flex", "flag": True, "tags": ["a", "b"], "items": [{"role": "x", "k": 1}]},
    },
    "key": {"name": "laptop", "labels": {"team": "a"}},
}
numbers = st.sampled_from(["request.prompt_tokens", "1", "5", "9000", "2", "int(request.body.n)"])
texts = st.sampled_from(
    ["request.model", 'request.headers["x-team"]', "key.labels.team", '"a"', "'llama'", 'key.labels["team"]']
)
anything = numbers | texts | st.sampled_from(["request.body.tier", "request.body.n", "request.body.f"])
sums = st.builds("({} {} {})".format, numbers, st.sampled_from("+-*%/"), numbers) | numbers
dynamic = st.sampled_from(["request.body.n", "request.body.f"])
marks = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
simple = st.one_of(
    st.builds("{} {} {}".format, sums, marks, sums),
    st.builds("{} {} {}".format, dynamic, marks, sums),
    st.builds("{} {} {}".format, texts, marks, texts),
    st.builds("{} {} {}".format, st.just("request.body.tier"), st.sampled_from(["==", "!="]), anything),
    st.builds("{}.{}({})".format, texts, st.sampled_from(["startsWith", "endsWith", "contains"]), texts),
    st.builds("{} in [{}, {}]".format, texts, texts, texts),
    st.builds("{} in request.body.tags".format, texts),
    st.builds("request.body.tags.{}(t, t == {})".format, st.sampled_from(["exists", "all", "exists_one"]), texts),
    st.builds("request.body.items.exists(m, m.k {} {} && m.role == {})".format, marks, sums, texts),
    st.sampled_from(
        ["request.stream", "request.body.flag", "true", "has(request.body.n)", "size(request.body.tags) > 1"]
    ),
)
expressions = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds("({} && {})".format, inner, inner),
        st.builds("({} || {})".format, inner, inner),
        st.builds("!({})".format, inner),
        st.builds("({} ? {} : {})".format, inner, inner, inner),
    ),
    max_leaves=5,
)


@given(expressions)
def test_with_all_values_present_it_means_what_cel_means(source: str) -> None:
    """The source, evaluated by the library with the whole request, equals the rewritten text with flat values."""
    try:
        check(source)
    except CelError as error:
        assert "use at most" in error.fix
        return
    try:
        meant = evaluator.evaluate(evaluator.compile_expression(source), PRESENT) is True
    except evaluator.EvaluationFailed:
        meant = False
    request, key = PRESENT["request"], PRESENT["key"]
    compiled_policies = compiled(
        (Policy(name="p", require=source),),
        (Deployment(slot=0, name="d0", region="eu", engine="vllm", models={"llama": "x"}, endpoints=()),),
    )
    reader = BodyReader(compiled_policies.needs_body)
    asked = RequestAttributes(**{**request, "body": reader.read(msgspec.json.encode(request["body"]))})
    decision = compiled_policies.evaluate(asked, Key(id="k", secret_hmac="", **key))
    assert (decision.allowed is None) == meant


words = st.sampled_from(
    [*'()[]{}.,?:!-+*/%<>="&| ', "==", "&&", "||", "in", "has", "request", "body", "key", "labels", "model", "true"]
) | st.sampled_from(
    ["null", "1", "0.5", '"a"', "exists", "size", "m", "matches", "\n", "//", "0x", "\\", "request.body.a"]
)


@given(st.text(max_size=40) | st.lists(words, max_size=25).map("".join) | st.lists(words, max_size=25).map(" ".join))
def test_any_text_is_parsed_or_refused_with_a_position(source: str) -> None:
    try:
        expression = check(source)
    except CelError as error:
        assert 0 <= error.offset <= min(len(source), CHARS_MAX) and error.message and error.fix
        return
    evaluator.compile_expression(source)
    evaluator.compile_expression(expression.text)
