"""Strategies and policies of another installed package: found by entry points, and tested by the same suite."""

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

MODULE = '''"""A strategy and a policy of another package."""

from fleetgate.core.policy import Judgement
from fleetgate.core.strategies import Ranking


def order(candidates, load, turn):
    """The last name first."""
    return Ranking(sorted(candidates, key=lambda c: c.name, reverse=True), turn)


def lead(candidates):
    """Load never matters."""
    return max(candidates, key=lambda c: c.name)


def short_prompts_stay_home(facts, key, deployments):
    """Prompts of up to 100 tokens stay in the region of the label `home`; without the label none is allowed."""
    home = frozenset(d.slot for d in deployments if d.region == key.labels.get("home", ""))
    return Judgement(allowed=home, preferred=tuple(sorted(home))) if facts.prompt_tokens <= 100 else Judgement()


def needs_a_module_that_is_not_there(*_):
    raise AssertionError("never called")
'''
ENTRY_POINTS = """[fleetgate.strategies]
overflow = other_package
last-name = other_package
no-order = other_package:Judgement
gone = other_package.missing

[fleetgate.policies]
home = other_package:short_prompts_stay_home
text = other_package:__doc__
"""


def in_memory(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """The highest slot first."""
    return Ranking(sorted(candidates, key=lambda c: -c.slot), turn)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A package that is installed as far as Python can tell, and a strategy registered as an object."""
    site = tmp_path_factory.mktemp("site")
    (site / "other_package.py").write_text(MODULE)
    about = site / "other_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    before = set(strategies._registered), set(plugins._policies)
    sys.path.insert(0, str(site))
    strategies.register("in-memory", SimpleNamespace(order=in_memory))
    yield plugins.load()
    sys.path.remove(str(site))
    sys.modules.pop("other_package", None)
    for name in set(strategies._registered) - before[0]:
        del strategies._registered[name]
    for name in set(plugins._policies) - before[1]:
        del plugins._policies[name]
    clear()


def clear() -> None:
    for cached in (strategies.names, strategies.find, strategies.find_lead):
        cached.cache_clear()


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("name", [*strategies.names(), "last-name", "in-memory"])
class TestEveryStrategy:
    """One suite for strategies that are built in, installed or registered."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(situation=situations())
    def test_it_conforms(self, name: str, situation: Situation) -> None:
        assert name in strategies.names()
        check_answer(strategies.find(name), situation)
        check_order_of_writing(strategies.find(name), situation)

    def test_it_holds_for_long(self, name: str) -> None:
        check_long_run(strategies.find(name), tuple(Candidate(name=f"d{n}", slot=n, limit=n) for n in range(4)))

    def test_its_lead_is_the_first_of_its_order(self, name: str) -> None:
        route = model_routes(gateway(name), Snapshot(version=1, made_at_s=0.0, deployments=DEPLOYMENTS), "")["m"]
        load = {c.slot: strategies.CandidateState(0, 1.0, c.limit) for c in route.candidates}
        first = strategies.find(name)(route.candidates, load, {}).order[0]
        assert route.lead in (None, first)


def test_an_unusable_plug_in_is_reported_and_skipped(problems: tuple[str, ...]) -> None:
    reported = {problem.split()[1]: problem for problem in problems}
    assert set(reported) == {"overflow", "no-order", "gone", "text"}
    assert "built in and cannot be replaced" in reported["overflow"]
    assert "no function `order" in reported["no-order"]
    assert "No module named" in reported["gone"] and "fleetgate.strategies (other_package.missing)" in reported["gone"]
    assert "not a function" in reported["text"]


def test_loading_again_changes_nothing(problems: tuple[str, ...]) -> None:
    assert plugins.load() == problems and plugins.names() == ("home",)


def test_a_name_is_unique(problems: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="another strategy is called last-name"):
        strategies.register("last-name", SimpleNamespace(order=in_memory))
    with pytest.raises(ValueError, match="another Python policy has the name home"):
        plugins.register_policy("home", lambda facts, key, deployments: PolicyDecision())


DEPLOYMENTS = tuple(
    Deployment(slot=slot, name=f"d{slot}", region=region, engine="vllm", models={"m": "m"}, endpoints=())
    for slot, region in enumerate(("eu", "us", "eu"))
)


def gateway(strategy: str, *policies: Policy) -> Gateway:
    """A Gateway over all three Deployments."""
    return Gateway(
        slot=0,
        name="chat",
        domain="example.com",
        protocol="openai",
        strategy=strategy,
        upstreams=tuple(Upstream(deployment=deployment.name, rank=1) for deployment in DEPLOYMENTS),
        policies=policies,
    )


# The same policy, by an installed package and in CEL.
SHORT = "request.prompt_tokens <= 100"
AT_HOME = "deployment.region == key.labels.home"
SAME = {
    "python": Policy(name="home", python="home"),
    "python and when": Policy(name="home", python="home", when=SHORT),
    "cel": Policy(name="home", when=SHORT, require=AT_HOME, prefer=("d0", "d1", "d2")),
    "one expression": Policy(name="home", require=f"!({SHORT}) || {AT_HOME}"),
}


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("form", SAME)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt_tokens=st.integers(0, 200), home=st.sampled_from([None, "eu", "us", "mars", ""]))
def test_a_policy_is_the_same_in_python_and_in_cel(form: str, prompt_tokens: int, home: str | None) -> None:
    labels = {} if home is None else {"home": home}
    key = Key(id="k", name="k", secret_hmac="", labels=labels)
    decision = CompiledPolicies.compile(gateway("overflow", SAME[form]), DEPLOYMENTS).evaluate(
        RequestAttributes(model="m", prompt_tokens=prompt_tokens), key
    )
    at_home = {"eu": {0, 2}, "us": {1}}.get(home or "", set())
    slots = at_home if prompt_tokens <= 100 else {0, 1, 2}
    assert (decision.allowed if decision.allowed is not None else {0, 1, 2}) == slots
    assert decision.denied_by == ("" if slots else "home")
    assert set(decision.preferred) in (set(), slots)
