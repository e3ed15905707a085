"""Strategies and policies of another installed package: found by entry points, and tested by the same suite."""

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetgate.core import policy
from fleetgate.core import strategies as old_strategies
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

# Every name that these modules had before they moved, as a package that was written then uses them.
OLD_MODULE = '''"""A strategy and two policies that use all old names of the core."""

from fleetgate.core import policy, strategies
from fleetgate.core.policy import ALLOWED, BodyPath, Facts, Judgement, PathStep, PythonPolicy
from fleetgate.core.strategies import (
    NO_TURN, Candidate, Lead, Load, Plugin, Ranking, Standing, Strategy, Turn,
    find, find_lead, least_cost, names, overflow, register,
)
from fleetgate.core.strategies import capacity_round_robin as spread

HOME: BodyPath = ("metadata", "home")
step: PathStep = HOME[0]


def order(candidates: list[Candidate], load: Load, turn: Turn) -> Ranking:
    """As overflow."""
    assert all(isinstance(load[c.slot], Standing) and isinstance(c, Candidate) for c in candidates)
    for standing in map(load.get, (c.slot for c in candidates)):
        assert standing.unwelcome is bool(standing.fit and (standing.fit.tight or standing.late))
    built_in: Strategy = find("overflow")
    assert built_in is overflow.order and {"overflow", "least_cost", "capacity_round_robin"} <= set(names())
    assert callable(spread.order) and callable(least_cost.order)
    return Ranking(built_in(candidates, load, NO_TURN).order, turn or NO_TURN)


lead: Lead = find_lead("overflow")


class Again(Plugin):
    """The same, registered by the package itself."""


Again.order = staticmethod(order)
Again.lead = staticmethod(lead)
register("again", Again)


def at_home(facts: Facts, key, deployments) -> Judgement:
    """Requests whose body names a home stay there."""
    assert type(facts) is Facts and policy.Facts is Facts and strategies.Ranking is Ranking
    home = facts.body.get(HOME)
    if home is None:
        return ALLOWED
    return Judgement(allowed=frozenset(d.slot for d in deployments if d.region == home))


at_home.needs_body = (HOME,)
typed: PythonPolicy = at_home
'''
OLD_ENTRY_POINTS = """[fleetgate.strategies]
old = old_package

[fleetgate.policies]
at-home = old_package:typed
"""


def in_memory(candidates: Sequence[Candidate], load: Load, turn: Turn) -> Ranking:
    """The highest slot first."""
    return Ranking(sorted(candidates, key=lambda c: -c.slot), turn)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A package that is installed as far as Python can tell, and a strategy registered as an object."""
    site = tmp_path_factory.mktemp("site")
    for package, module, points in (
        ("other_package", MODULE, ENTRY_POINTS),
        ("old_package", OLD_MODULE, OLD_ENTRY_POINTS),
    ):
        (site / f"{package}.py").write_text(module)
        about = site / f"{package}-1.0.dist-info"
        about.mkdir()
        name = package.replace("_", "-")
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(points)
    before = set(strategies._registered), set(plugins._policies)
    sys.path.insert(0, str(site))
    strategies.register("in-memory", SimpleNamespace(order=in_memory))
    yield plugins.load()
    sys.path.remove(str(site))
    for package in ("other_package", "old_package"):
        sys.modules.pop(package, None)
    for name in set(strategies._registered) - before[0]:
        del strategies._registered[name]
    for name in set(plugins._policies) - before[1]:
        del plugins._policies[name]
    clear()


def clear() -> None:
    for cached in (strategies.names, strategies.find, strategies.find_lead):
        cached.cache_clear()


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize("name", [*strategies.names(), "last-name", "in-memory", "old", "again"])
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
    assert plugins.load() == problems and plugins.names() == ("at-home", "home")


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


@pytest.mark.usefixtures("problems")
@pytest.mark.parametrize(("home", "slots"), [(None, {0, 1, 2}), ("eu", {0, 2}), ("us", {1}), ("mars", set())])
def test_a_policy_with_all_old_names_decides(home: str | None, slots: set[int]) -> None:
    policies = CompiledPolicies.compile(gateway("old", Policy(name="at-home", python="at-home")), DEPLOYMENTS)
    path = ("metadata", "home")
    assert path in policies.needs_body
    request = RequestAttributes(model="m", body={} if home is None else {path: home})
    decision = policies.evaluate(request, Key(id="k", name="k", secret_hmac=""))
    assert (decision.allowed if decision.allowed is not None else {0, 1, 2}) == slots
    assert decision.denied_by == ("" if slots else "at-home")


def test_the_old_modules_have_all_their_public_names() -> None:
    """By the list at the last version in which they were the real ones."""
    for module, wanted in {
        policy: "ALLOWED BodyPath Facts Judgement PathStep PythonPolicy",
        old_strategies: "Candidate Lead Load NO_TURN Plugin Ranking Standing Strategy Turn "
        "find find_lead names register",
    }.items():
        for name in wanted.split():
            assert name in module.__all__ and getattr(module, name) is not None
            assert name in OLD_MODULE, "the package above uses it"
