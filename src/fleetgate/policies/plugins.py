"""Strategies and policies that other packages provide through entry points.

They are trusted code: they run in the processes of Fleetgate with all rights, and only their exceptions are caught.
"""

from importlib import metadata
from typing import Any

from fleetgate.core.routing import strategies
from fleetgate.core.routing.policy_decision import PythonPolicy

STRATEGIES = "fleetgate.strategies"  # name -> a module or object with `order` and, optionally, `lead`
POLICIES = "fleetgate.policies"  # name -> a `PythonPolicy`


class NoSuchPolicy(Exception):
    """No installed package provides a Python policy of this name."""


_policies: dict[str, PythonPolicy] = {}


def load() -> tuple[str, ...]:
    """Find and register every installed plug-in; a second call adds new ones.

    Shape: one sentence for each plug-in that cannot be used, for the log and an Event.
    """
    problems = []
    for group, register in ((STRATEGIES, strategies.register), (POLICIES, register_policy)):
        for point in sorted(metadata.entry_points(group=group), key=lambda point: (point.name, point.value)):
            try:
                plugin: Any = point.load()
                register(point.name, plugin)
            except Exception as error:  # code of another package may raise anything; start without it
                problems.append(f"plug-in {point.name} of {group} ({point.value}) cannot be used: {error}")
    return tuple(problems)


def register_policy(name: str, policy: PythonPolicy) -> None:
    """Register a policy in Python. Raises: `ValueError` if it is not a function or the name is taken."""
    if not callable(policy):
        raise ValueError("it is not a function of request attributes, key and deployments")
    if _policies.setdefault(name, policy) is not policy:
        raise ValueError(f"another Python policy has the name {name}; rename one of them")


def names() -> tuple[str, ...]:
    """The names of the registered Python policies, in alphabetical order."""
    return tuple(sorted(_policies))


def find(name: str) -> PythonPolicy:
    """The Python policy of a name. Raises: `NoSuchPolicy`."""
    if name not in _policies:
        raise NoSuchPolicy(f"Python policy {name} is not installed")
    return _policies[name]
