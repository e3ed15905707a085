"""The type checker of expressions: what it refuses, and the values that absent entries have."""

import pytest

from fleetgate.core.routing.policy_decision import BodyPath, RequestAttributes
from fleetgate.policies.cel_parser import CHARS_MAX, DEPTH_MAX, NODES_MAX, CelError
from fleetgate.policies.type_checker import check
from tests.unit.policies.rig import key, policies, policy


@pytest.mark.parametrize(
    ("source", "column", "says"),
    [
        ("request.promt_tokens > 8000", 9, "did you mean `request.prompt_tokens`?"),
        ("requst.model == 'a'", 1, "did you mean `request`?"),
        ("request.model == llama", 18, 'put text in quotes: "llama"'),
        ('request.prompt_tokens > "8000"', 23, "compares a whole number with text"),
        ("request.model == 3", 15, "compares text with a whole number"),
        ("request.model == null", 15, "never absent"),
        ("request.stream < true", 16, "compares true or false"),
        ("request.prompt_tokens", 9, "must be true or false, but this is a whole number"),
        ("request.prompt_tokens && true", 9, "each side of `&&`"),
        ("!request.model", 10, "the operand of `!`"),
        ("request.model ? true : false", 9, "the condition before `?`"),
        ("request.stream ? 1 : 'a'", 16, "a whole number or text"),
        ("request.prompt_tokens / 2.0 > 3.0", 23, "joins a whole number and a number"),
        ("request.body.n + 1 > 3", 14, "convert it with int() or double()"),
        ("deployment.usd_per_hour * 2.0 < 3.0", 12, "a number that may be absent"),
        ("request.model == 'a", 18, "close the text"),
        ("request.model = 'a'", 15, "compare with =="),
        ("request.stream & true", 16, "write && for and"),
        ("request.stream &&", 18, "not complete"),
        ("(request.stream", 16, "needs `)`"),
        ("request.stream true", 16, "write && or ||"),
        ("{'a': 1}.a == 1", 1, "cannot contain a map"),
        ("request == null", 1, "cannot be used as a whole"),
        ("request.headers == null", 9, "cannot be used as a whole"),
        ("has(key.labels)", 9, "is always present"),
        ('request.headers["X-Team"] == "a"', 17, 'write "x-team"'),
        ('request.headers["Authorization"] == "a"', 17, "may contain a secret"),
        ("request.headers[key.name] == 'a'", 21, "must be a literal"),
        ("request.headers[0] == 'a'", 17, "has names, not numbers"),
        ("key.name.first == 'a'", 10, "is text and has no fields"),
        ("deployment.models[0] == 'a'", 19, "is a list"),
        ("request.model.startWith('a')", 15, "did you mean `.startsWith`?"),
        ("len(request.model) > 1", 1, "there is no function `len`"),
        ("request.model.startsWith(3)", 26, "reads text"),
        ("request.model.startsWith('a', 'b')", 15, "give 1"),
        ("request.model.matches(key.name)", 27, "must be a literal"),
        ("request.model.matches('(')", 23, "not a regular expression"),
        ("request.model.matches('(a{50}){50}')", 23, "costs too much"),
        ("request.model in ['a', 1]", 19, "in a list"),
        ("request.prompt_tokens in ['a']", 9, "the list has string values"),
        ("request.body.stop == ['a']", 19, "a list"),
        ("request.body.a.exists(m, request.body.b.exists(n, n == m))", 41, "is inside another"),
        ("request.body.a.exists(1, true)", 23, "not a new name for the items"),
        ("request.body.a.exists(key, true)", 23, "not a new name for the items"),
        ("deployment.models.exists(m, m.x == 'a')", 31, "has no fields"),
        ("request.stream\n  && request.promt_tokens > 1", 14, "did you mean"),
        ("true\n&& request.a.if", 14, "after the dot"),
        ("1 == 99999999999999999999", 1, "cannot be read"),
    ],
)
def test_an_error_has_its_column_and_a_fix(source: str, column: int, says: str) -> None:
    with pytest.raises(CelError) as caught:
        check(source)
    error = caught.value
    assert says in str(error)
    assert error.position(source).endswith(f"column {column}"), error.position(source)
    assert error.position(source).startswith("line 2") == ("\n" in source)


@pytest.mark.parametrize(
    "source",
    [
        "true || " * CHARS_MAX + "true",
        " + ".join(["1"] * NODES_MAX) + " == 1",
        "(" * (DEPTH_MAX + 1) + "true" + ")" * (DEPTH_MAX + 1),
        "!" * (DEPTH_MAX + 1) + "true",
        "request.body" + ".a" * 9 + " == 1",
    ],
)
def test_an_expression_is_bounded(source: str) -> None:
    with pytest.raises(CelError, match=r"use at most|several policies|remove some|nearer to the top"):
        check(source)


def test_a_variable_can_be_forbidden() -> None:
    with pytest.raises(CelError, match="with `require:` alone"):
        check("deployment.tier == 'spot'", forbidden="deployment")


def test_only_values_that_are_read_are_needed() -> None:
    compiled = policies(
        policy(when='request.headers["x-team"] == "a" && request.body.user == null', priority="critical"),
        policy(when='request.body.messages[0].role == "system" || "b" in request.headers', priority="critical"),
        policy(when='"request.body.nothing" == request.model', priority="critical"),
    )
    assert compiled.needs_headers == (b"b", b"x-team")
    assert set(compiled.needs_body) == {("user",), ("messages", 0, "role")}
    assert not compiled.is_empty and policies().is_empty


BODY: dict[BodyPath, object] = {
    ("n",): 5,
    ("tier",): "flex",
    ("flag",): True,
    ("tags",): ["a", "b"],
    ("messages",): [{"role": "system"}, {"role": "user", "content": "x"}],
}


@pytest.mark.parametrize(
    ("source", "present", "absent"),
    [
        ("request.body.n > 3", True, False),
        ("request.body.n < 9", True, False),
        ("!(request.body.n > 3)", False, True),
        ("request.body.n == 5", True, False),
        ("request.body.n == 5.0", True, False),
        ("request.body.n != 5", False, True),
        ("int(request.body.n) + 1 == 6", True, False),
        ("int(request.body.n) + 1 == 1", False, True),
        ("double(request.body.n) < 0.5", False, True),
        ("string(request.body.n) == ''", False, True),
        ('request.body.tier == "flex"', True, False),
        ('request.body.tier != "flex"', False, True),
        ('request.body.tier == ""', False, True),
        ("request.body.tier == null", False, True),
        ("null != request.body.tier", True, False),
        ("has(request.body.tier)", True, False),
        ('"tier" in request.body', True, False),
        ('request.body.tier.startsWith("fl")', True, False),
        ('request.body.tier.contains("")', True, True),
        ('request.body.tier in ["flex", ""]', True, True),
        ('request.body.tier.matches("^f.*x$")', True, False),
        ("request.body.flag", True, False),
        ("request.body.flag ? false : true", False, True),
        ("size(request.body.tags) == 2", True, False),
        ("request.body.tags.size() == 0", False, True),
        ("size(request.body.tier) == 4", True, False),
        ('"a" in request.body.tags', True, False),
        ('request.body.tags.all(t, t in ["a", "b"])', True, True),
        ('request.body.tags.exists_one(t, t == "a")', True, False),
        ('request.body.messages.exists(m, m.role == "system")', True, False),
        ('request.body.messages.exists(m, m.content == "")', True, False),
        ("request.body.messages.exists(m, m.content == null)", True, False),
        ("request.body.messages.exists(m, has(m.content))", True, False),
        ('request.body.messages.all(m, m.role.startsWith("s"))', False, True),
        ("request.body.tags.exists(t, t.role == null)", True, False),
        ('request.headers["x-team"] == "a"', True, False),
        ("request.headers['x-team'] == null", False, True),
        ('"x-team" in request.headers', True, False),
        ('int(request.headers["x-n"]) > 3', True, False),
        ('size(request.headers["x-team"]) == 1', True, False),
        ('key.labels["a.b/c"] == "d"', True, False),
        ('key.labels.team == "" || !("team" in key.labels)', False, True),
        ("deployment.usd_per_hour < 3.0", True, False),
        ("deployment.usd_per_hour < 3", True, False),
        ("deployment.usd_per_hour == null", False, True),
        ('deployment.labels.zone == "z" && deployment.cluster != ""', True, False),
    ],
)
def test_an_absent_value_reads_as_empty(source: str, present: bool, absent: bool) -> None:
    compiled = policies(policy(require=source))
    full = RequestAttributes(model="m", headers={"x-team": "a", "x-n": "5"}, body=BODY)
    labelled = compiled.evaluate(full, key(team="t", **{"a.b/c": "d"}))
    # The labelled Deployment has slot 0, the bare one slot 1.
    assert not labelled.notes and (labelled.allowed is None or 0 in labelled.allowed) == present
    bare = compiled.evaluate(RequestAttributes(model="m"), key())
    assert not bare.notes and (bare.allowed is None or 1 in bare.allowed) == absent


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({("n",): "many"}, "another type"),
        ({("n",): {"a": 1}}, "another type"),
        ({("n",): 1, ("list",): "text"}, "not a list"),
        ({("n",): 1, ("list",): ["a"] * 300}, "more than 256 items"),
        ({("n",): 1, ("size",): 5}, "no size"),
        ({("n",): 1, ("flag",): 5}, "another type"),
    ],
)
def test_a_value_of_another_type_fails_without_showing_it(body: dict[BodyPath, object], why: str) -> None:
    source = 'request.body.n > 3 || "a" in request.body.list || size(request.body.size) > 3 || request.body.flag'
    decision = policies(policy(require=source)).evaluate(RequestAttributes(model="m", body=body), key())
    assert decision.denied_by == "p0" and len(decision.notes) == 1
    assert (
        why in decision.notes[0] and "many" not in decision.notes[0] and "the request is refused" in decision.notes[0]
    )
