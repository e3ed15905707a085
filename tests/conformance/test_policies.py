"""Strategies and policies that another package installs: found by their entry points, and held to the same suite."""

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetgate.core.model import Deployment, Gateway, Key, Policy, Snapshot, Upstream
from fleetgate.core.routing import strategies
from fleetgate.core.routing.policy_decision import PolicyDecision, RequestAttributes
from fleetgate.core.routing.route import model_routes
from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn
from fleetgate.policies import plugins
from fleetgate.policies.policy_set import CompiledPolicies
from tests.conformance.test_strategies import Situation, check_answer, check_long_run, check_order_of_writing
from tests.properties.test_routing import situations

MODULE = '''"""A strategy and a policy of somebody's own."""

from fleetgate.core.policy import Judgement
from fleetgate.core.strategies import Ranking


def order(candidates, load, turn):
    """The last name first."""
    return Ranking(sorted(candidates, key=lambda c: c.name, reverse=True), turn)


def lead(candidates):
    """Load never decides."""
    return max(candidates, key=lambda c: c.name)


def short_prompts_stay_home(facts, key, deployments):
    """Up to 100 tokens only where the key is at home; absent is nowhere."""
    home = frozenset(d.slot for d in deployments if d.region == key.labels.get("home", ""))
    return Judgement(allowed=home, preferred=tuple(sorted(home))) if facts.prompt_tokens <= 100 else Judgement()


def needs_a_module_that_is_not_there(*_):
    raise AssertionError("never called")
'''
ENTRY_POINTS = """[fleetgate.strategies]
overflow = somebodys_rules
last-name = somebodys_rules
no-order = somebodys_rules:Judgement
gone = somebodys_rules.missing

[fleetgate.policies]
home = somebodys_rules:short_prompts_stay_home
text = somebodys_rules:__doc__
"""


def in_memory(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """The highest slot first."""
    return Ranking(sorted(candidates, key=lambda c: -c.slot), turn)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A package that is really installed, as far as Python can tell, and a strategy that only a module object gives."""
    site = tmp_path_factory.mktemp("site")
    (site / "somebodys_rules.py").write_text(MODULE)
    about = site / "somebodys_rules-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-rules\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    kept = set(strategies._registered), set(plugins._policies)
    sys.path.insert(0, str(site))
    strategies.register("in-memory", SimpleNamespace(order=in_memory))
    yield plugins.load()
    sys.path.remove(str(site))
    sys.modules.pop("somebodys_rules", None)
    for name in set(strategies._registered) - kept[0]:
        del strategies._registered[name]
    for name in set(plugins._policies) - kept[1]:
        del plugins._policies[name]
    clear()


def clear() -> None:
    for remembered in (strategies.names, strategies.find, strategies.find_lead):
        remembered.cache_clear()


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("name", [*strategies.names(), "last-name", "in-memory"])
class TestEveryStrategy:
    """Built in, installed or registered: one suite."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(situation=situations())
    def test_it_conforms(self, name: str, situation: Situation) -> None:
        assert name in strategies.names()
        check_answer(strategies.find(name), situation)
        check_order_of_writing(strategies.find(name), situation)

    def test_it_holds_for_long(self, name: str) -> None:
        check_long_run(strategies.find(name), tuple(Candidate(name=f"d{n}", slot=n, limit=n) for n in range(4)))

    def test_it_makes_lanes_and_its_lead_is_who_it_names_first(self, name: str) -> None:
        lane = model_routes(gateway(name), Snapshot(version=1, made_at_s=0.0, deployments=DEPLOYMENTS), "")["m"]
        load = {c.slot: strategies.CandidateState(0, 1.0, c.limit) for c in lane.candidates}
        first = strategies.find(name)(lane.candidates, load, {}).order[0]
        assert lane.lead in (None, first)


def test_what_cannot_be_used_is_told_and_stops_nothing(problems: tuple[str, ...]) -> None:
    told = {problem.split()[1]: problem for problem in problems}
    assert set(told) == {"overflow", "no-order", "gone", "text"}
    assert "built in and cannot be replaced" in told["overflow"]
    assert "no function `order" in told["no-order"]
    assert "No module named" in told["gone"] and "fleetgate.strategies (somebodys_rules.missing)" in told["gone"]
    assert "not a function" in told["text"]


def test_loading_again_changes_nothing(problems: tuple[str, ...]) -> None:
    assert plugins.load() == problems and plugins.names() == ("home",)


def test_a_name_is_given_once(problems: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="another strategy is called last-name"):
        strategies.register("last-name", SimpleNamespace(order=in_memory))
    with pytest.raises(ValueError, match="another Python policy is called home"):
        plugins.register_policy("home", lambda facts, key, deployments: PolicyDecision())


DEPLOYMENTS = tuple(
    Deployment(slot=slot, name=f"d{slot}", region=region, engine="vllm", models={"m": "m"}, endpoints=())
    for slot, region in enumerate(("eu", "us", "eu"))
)


def gateway(strategy: str, *policies: Policy) -> Gateway:
    """A Gateway over all three."""
    return Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy=strategy,
        upstreams=tuple(Upstream(deployment=deployment.name, rank=1) for deployment in DEPLOYMENTS),
        policies=policies,
    )


# The same rule, by an installed package and in CEL.
SHORT = "request.prompt_tokens <= 100"
AT_HOME = "deployment.region == key.labels.home"
SAME = {
    "python": Policy(name="home", python="home"),
    "python and when": Policy(name="home", python="home", when=SHORT),
    "cel": Policy(name="home", when=SHORT, require=AT_HOME, prefer=("d0", "d1", "d2")),
    "one expression": Policy(name="home", require=f"!({SHORT}) || {AT_HOME}"),
}


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("way", SAME)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt_tokens=st.integers(0, 200), home=st.sampled_from([None, "eu", "us", "mars", ""]))
def test_a_rule_is_the_same_in_python_and_in_cel(way: str, prompt_tokens: int, home: str | None) -> None:
    labels = {} if home is None else {"home": home}
    key = Key(id="k", name="k", secret_hmac="", labels=labels)
    told = CompiledPolicies.compile(gateway("overflow", SAME[way]), DEPLOYMENTS).judge(
        RequestAttributes(model="m", prompt_tokens=prompt_tokens), key
    )
    at_home = {"eu": {0, 2}, "us": {1}}.get(home or "", set())
    slots = at_home if prompt_tokens <= 100 else {0, 1, 2}
    assert (told.allowed if told.allowed is not None else {0, 1, 2}) == slots
    assert told.denied_by == ("" if slots else "home")
    assert set(told.preferred) in (set(), slots)
