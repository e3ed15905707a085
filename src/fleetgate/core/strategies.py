"""Old module name of `fleetgate.core.routing.strategies`, which installed strategy plug-ins still import."""

from fleetgate.core.routing.strategies import (
    NO_TURN,
    Candidate,
    Lead,
    Load,
    Plugin,
    Ranking,
    Strategy,
    Turn,
    capacity_round_robin,
    find,
    find_lead,
    least_cost,
    names,
    overflow,
    register,
)
from fleetgate.core.routing.strategies import CandidateState as Standing

__all__ = [
    "NO_TURN",
    "Candidate",
    "Lead",
    "Load",
    "Plugin",
    "Ranking",
    "Standing",
    "Strategy",
    "Turn",
    "capacity_round_robin",
    "find",
    "find_lead",
    "least_cost",
    "names",
    "overflow",
    "register",
]
