"""Old module name of `fleetgate.core.routing.strategies`, which installed strategy plug-ins still import."""

from fleetgate.core.routing.strategies import Candidate, Load, Ranking, Turn

__all__ = ["Candidate", "Load", "Ranking", "Turn"]
