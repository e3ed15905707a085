"""One condition over the Deployments of a Gateway, evaluated as early as what it reads is known."""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from fleetgate.core.model import Deployment, Gateway, Key
from fleetgate.core.routing.policy_decision import RequestAttributes
from fleetgate.policies import bindings as values
from fleetgate.policies import evaluator as engine
from fleetgate.policies.evaluator import EvaluationFailed
from fleetgate.policies.type_checker import Expression

# Texts of headers and bodies repeat: models, tiers, teams; and a pattern is compiled at every evaluation, for 30 µs.
# Numbers are not remembered: they hardly repeat, and 1, 1.0 and true are one key of a dict but three values of CEL.
_REMEMBERED_MAX = 1000
_REMEMBERED_CHARS_MAX = 64


class EvaluationStage(IntEnum):
    """When everything that a condition reads is known."""

    SNAPSHOT = 0
    KEY = 1
    REQUEST = 2


class TermOutcome(NamedTuple):
    """For which Deployments, by slot, a condition holds, for which it could not be evaluated, and why."""

    holds: frozenset[int]
    failed: frozenset[int] = frozenset()
    reason: str = ""


class Term:
    """A compiled condition.

    Deployments that look the same to it are asked about once: a rule on regions costs one evaluation a region.
    """

    def __init__(self, expression: Expression, gateway: Gateway, deployments: Sequence[Deployment]) -> None:
        self._program = engine.compile_text(expression.text)
        leaves = expression.leaves
        self._of_key = [(name, leaf) for name, leaf in leaves if leaf.root == "key"]
        self._of_request = [(name, leaf) for name, leaf in leaves if leaf.root == "request"]
        self.stage = (
            EvaluationStage.REQUEST
            if self._of_request
            else EvaluationStage.KEY
            if self._of_key
            else EvaluationStage.SNAPSHOT
        )
        fixed = {name: values.of_gateway(leaf, gateway) for name, leaf in leaves if leaf.root == "gateway"}
        own = [(name, leaf) for name, leaf in leaves if leaf.root == "deployment"]
        alike: dict[str, tuple[dict[str, object], list[int]]] = {}
        for deployment in deployments:
            seen = {**fixed, **{name: values.of_deployment(leaf, deployment) for name, leaf in own}}
            alike.setdefault(repr(seen), (seen, []))[1].append(deployment.slot)
        self._groups = [(seen, frozenset(slots)) for seen, slots in alike.values()]
        self._all = frozenset(deployment.slot for deployment in deployments)
        self._remembered: dict[tuple[object, ...], TermOutcome] = {}

    def at_key(self, key: Key) -> TermOutcome:
        """The outcome of a condition that reads nothing of the request."""
        return self._outcome(self.key_values(key))

    def key_values(self, key: Key) -> dict[str, object]:
        """What it reads of the key."""
        return {name: values.of_key(leaf, key) for name, leaf in self._of_key}

    def at_request(self, facts: RequestAttributes, known: Mapping[str, object]) -> TermOutcome:
        """The outcome for one request; `known` is `key_values` of its key."""
        try:
            read = {name: values.of_request(leaf, facts) for name, leaf in self._of_request}
        except EvaluationFailed as failed:
            return TermOutcome(frozenset(), self._all, failed.reason)
        if known:
            return self._outcome({**known, **read})
        texts = tuple(read.values())
        if not all(type(text) is str and len(text) <= _REMEMBERED_CHARS_MAX for text in texts):
            return self._outcome(read)
        outcome = self._remembered.get(texts)
        if outcome is None:
            outcome = self._outcome(read)
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[texts] = outcome
        return outcome

    def _outcome(self, read: dict[str, object]) -> TermOutcome:
        holds: list[frozenset[int]] = []
        failed: list[frozenset[int]] = []
        reason = ""
        for own, slots in self._groups:
            try:
                if engine.holds(self._program, {**own, **read} if own else read):
                    holds.append(slots)
            except EvaluationFailed as failure:
                failed.append(slots)
                reason = failure.reason
        return TermOutcome(_union(holds), _union(failed), reason)


def _union(parts: list[frozenset[int]]) -> frozenset[int]:
    return parts[0] if len(parts) == 1 else frozenset().union(*parts)


Bound = Callable[[RequestAttributes], TermOutcome]


def bind(term: Term, key: Key) -> Bound:
    """A condition for the requests of one key."""
    if term.stage < EvaluationStage.REQUEST:
        outcome = term.at_key(key)
        return lambda facts: outcome
    known = term.key_values(key)
    return lambda facts: term.at_request(facts, known)
