"""Strategies: one file each. A file is found by its name and gives one function, `order`.

A file may also give `lead(candidates)`: who certainly comes first while it is healthy and below its spill limit,
whatever the load of the others; None where load decides. It spares most requests the comparison.

`order(candidates, load, turn) -> Ranking`: the candidates in the order in which they should be tried. Every candidate
given has room and is up; what a strategy leaves out is not tried now. A strategy is pure: what it must remember from
one request to the next it returns as `Ranking.turn` and gets back as `turn`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import msgspec

Turn = Mapping[int, float]
NO_TURN: Turn = {}


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A Deployment as a strategy sees it, in one Gateway and for one model.

    Units: `units` in CU, `limit` in requests (0 for none), `paid_per_token` 1 where supply is not paid by the hour.
    """

    name: str
    slot: int
    region: str = ""
    rank: int = 1
    units: float = 1.0
    limit: int = 0
    spill_limit: int = 0
    distance: int = 0  # 0 in the proxy's own region, 1 elsewhere
    paid_per_token: int = 0


class Standing(NamedTuple):
    """How a candidate stands at the moment of the pick; health is 0 to 1, breaker times slow start."""

    in_flight: int
    health: float


Load = Mapping[int, Standing]  # by Deployment slot


class Ranking(NamedTuple):
    """A strategy's answer: whom to try, in order, and what to remember for the next request."""

    order: Sequence[Candidate]
    turn: Turn


Strategy = Callable[[Sequence[Candidate], Load, Turn], Ranking]
Lead = Callable[[Sequence[Candidate]], Candidate | None]


@cache
def names() -> tuple[str, ...]:
    """Every strategy there is, by file name, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def find_lead(name: str) -> Lead:
    """The `lead` of a strategy; one that never names anybody where its file has none."""
    lead: Lead = getattr(importlib.import_module(f"{__name__}.{name}"), "lead", _load_decides)
    return lead


def _load_decides(candidates: Sequence[Candidate]) -> Candidate | None:
    return None


@cache
def find(name: str) -> Strategy:
    """The strategy of a name.

    Raises: `KeyError` when no file of that name is in the folder.
    """
    if name not in names():
        raise KeyError(f"no strategy {name!r}; there are: {', '.join(names())}")
    strategy: Strategy = importlib.import_module(f"{__name__}.{name}").order
    return strategy
