"""Old module name of `fleetgate.core.routing.policy_decision`, which installed policy plug-ins still import."""

from fleetgate.core.routing.policy_decision import ALLOWED, BodyPath, PathStep, PythonPolicy
from fleetgate.core.routing.policy_decision import PolicyDecision as Judgement
from fleetgate.core.routing.policy_decision import RequestAttributes as Facts

__all__ = ["ALLOWED", "BodyPath", "Facts", "Judgement", "PathStep", "PythonPolicy"]
