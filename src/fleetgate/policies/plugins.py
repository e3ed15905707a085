"""Strategies and policies that other packages bring through entry points.

They run in our processes with all our rights: they are trusted code, and nothing of them is bounded but exceptions.
"""

from importlib import metadata
from typing import Any

from fleetgate.core.routing import strategies
from fleetgate.core.routing.policy_decision import PythonPolicy

STRATEGIES = "fleetgate.strategies"  # name -> a module (or object) with `order` and perhaps `lead`
POLICIES = "fleetgate.policies"  # name -> a function of Facts, Key and Deployments that gives a Judgement


class NoSuchPolicy(Exception):
    """No package that is installed brings a Python policy of this name."""


_policies: dict[str, PythonPolicy] = {}


def load() -> tuple[str, ...]:
    """Find and register every plug-in that is installed; a second call finds what is new.

    The answer is a sentence for each that cannot be used: for the log, and an Event where there is a store.
    """
    problems = []
    for group, register in ((STRATEGIES, strategies.register), (POLICIES, register_policy)):
        for point in sorted(metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
            try:
                plugin: Any = point.load()
                register(point.name, plugin)
            except Exception as error:  # importing somebody else's code may raise anything; we start without it
                problems.append(f"plug-in {point.name} of {group} ({point.value}) cannot be used: {error}")
    return tuple(problems)


def register_policy(name: str, policy: PythonPolicy) -> None:
    """Make a policy in Python known. Raises: `ValueError` when it is no function or the name is taken."""
    if not callable(policy):
        raise ValueError("it is not a function of facts, key and deployments")
    if _policies.setdefault(name, policy) is not policy:
        raise ValueError(f"another Python policy is called {name}; rename one of them")


def names() -> tuple[str, ...]:
    """The Python policies there are, in alphabetical order."""
    return tuple(sorted(_policies))


def find(name: str) -> PythonPolicy:
    """The Python policy of a name. Raises: `NoSuchPolicy`."""
    if name not in _policies:
        raise NoSuchPolicy(f"Python policy {name} is not installed")
    return _policies[name]
