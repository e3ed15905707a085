"""One condition over the Deployments of a Gateway, evaluated as soon as the values that it reads are known."""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from fleetgate.core.model import Deployment, Gateway, Key
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.policies import bindings, evaluator
from fleetgate.policies.evaluator import EvaluationFailed
from fleetgate.policies.type_checker import Expression

# Outcomes are cached by texts of headers and bodies: these repeat (models, tiers, teams), and the library compiles a
# pattern at every evaluation, which costs 30 µs. Numbers are not cached: they rarely repeat, and 1, 1.0 and true are
# one key of a dict but three values of CEL.
_CACHED_MAX = 1000
_CACHED_CHARS_MAX = 64


class EvaluationStage(IntEnum):
    """The earliest time at which every value that a condition reads is known."""

    SNAPSHOT = 0
    KEY = 1
    REQUEST = 2


class ConditionOutcome(NamedTuple):
    """The Deployments, by slot, that match a condition, those for which it could not be evaluated, and the reason."""

    matched: frozenset[int]
    failed: frozenset[int] = frozenset()
    reason: str = ""


class CompiledCondition:
    """A compiled condition.

    Deployments with equal values are evaluated once: a condition on regions costs one evaluation per region.
    """

    def __init__(self, expression: Expression, gateway: Gateway, deployments: Sequence[Deployment]) -> None:
        self._program = evaluator.compile_expression(expression.text)
        selectors = expression.selectors
        self._of_key = [(name, selector) for name, selector in selectors if selector.root == "key"]
        self._of_request = [(name, selector) for name, selector in selectors if selector.root == "request"]
        self.stage = (
            EvaluationStage.REQUEST
            if self._of_request
            else EvaluationStage.KEY
            if self._of_key
            else EvaluationStage.SNAPSHOT
        )
        of_gateway = {
            name: bindings.of_gateway(selector, gateway) for name, selector in selectors if selector.root == "gateway"
        }
        of_deployment = [(name, selector) for name, selector in selectors if selector.root == "deployment"]
        groups: dict[str, tuple[dict[str, object], list[int]]] = {}
        for deployment in deployments:
            values = {name: bindings.of_deployment(selector, deployment) for name, selector in of_deployment}
            values = {**of_gateway, **values}
            groups.setdefault(repr(values), (values, []))[1].append(deployment.slot)
        self._groups = [(values, frozenset(slots)) for values, slots in groups.values()]
        self._all = frozenset(deployment.slot for deployment in deployments)
        self._cache: dict[tuple[object, ...], ConditionOutcome] = {}

    def at_key(self, key: Key) -> ConditionOutcome:
        """The outcome of a condition that reads no value of the request."""
        return self._outcome(self.key_values(key))

    def key_values(self, key: Key) -> dict[str, object]:
        """The values that it reads of the key."""
        return {name: bindings.of_key(selector, key) for name, selector in self._of_key}

    def at_request(self, attributes: RequestAttributes, key_values: Mapping[str, object]) -> ConditionOutcome:
        """The outcome for one request; `key_values` are those of its key."""
        try:
            values = {name: bindings.of_request(selector, attributes) for name, selector in self._of_request}
        except EvaluationFailed as failed:
            return ConditionOutcome(frozenset(), self._all, failed.reason)
        if key_values:
            return self._outcome({**key_values, **values})
        texts = tuple(values.values())
        if not all(type(text) is str and len(text) <= _CACHED_CHARS_MAX for text in texts):
            return self._outcome(values)
        outcome = self._cache.get(texts)
        if outcome is None:
            outcome = self._outcome(values)
            if len(self._cache) >= _CACHED_MAX:
                self._cache.clear()
            self._cache[texts] = outcome
        return outcome

    def _outcome(self, values: dict[str, object]) -> ConditionOutcome:
        matched: list[frozenset[int]] = []
        failed: list[frozenset[int]] = []
        reason = ""
        for fixed, slots in self._groups:
            try:
                if evaluator.evaluate_condition(self._program, {**fixed, **values} if fixed else values):
                    matched.append(slots)
            except EvaluationFailed as failure:
                failed.append(slots)
                reason = failure.reason
        return ConditionOutcome(_union(matched), _union(failed), reason)


def _union(parts: list[frozenset[int]]) -> frozenset[int]:
    return parts[0] if len(parts) == 1 else frozenset().union(*parts)


BoundCondition = Callable[[RequestAttributes], ConditionOutcome]


def bind(condition: CompiledCondition, key: Key) -> BoundCondition:
    """A condition for the requests of one key."""
    if condition.stage < EvaluationStage.REQUEST:
        outcome = condition.at_key(key)
        return lambda attributes: outcome
    key_values = condition.key_values(key)
    return lambda attributes: condition.at_request(attributes, key_values)
