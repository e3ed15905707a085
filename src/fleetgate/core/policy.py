"""Old place of `fleetgate.core.routing.policy_decision`, which installed policy plug-ins still import."""

from fleetgate.core.routing.policy_decision import ALLOWED, Facts, Judgement

__all__ = ["ALLOWED", "Facts", "Judgement"]
