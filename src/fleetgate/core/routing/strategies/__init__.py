"""Strategies: one file each. A file is found by its name and gives one function, `order`.

A file may also give `lead(candidates)`: who certainly comes first while it is healthy and below its spill limit,
whatever the load of the others; None where load decides. It spares most requests the comparison.

`order(candidates, load, turn) -> Ranking`: the candidates in the order in which they should be tried. Every candidate
given is up and has a free place; what a strategy leaves out is not tried now. Whether the SLO would be kept at the
first is asked afterwards: if not, the strategy is asked once more for those where it would. A strategy is pure: what it
must remember from one request to the next it returns as `Ranking.turn` and gets back as `turn`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import msgspec

from fleetgate.core.capacity.latency_model import LatencyPrediction

Turn = Mapping[int, float]
NO_TURN: Turn = {}


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A Deployment as a strategy sees it, in one Gateway and for one model.

    Units: `limit` in requests as written in the Snapshot (0 for none), `paid_per_token` 1 where supply
    is not paid by the hour, `usd_per_unit` the price of a reference request, `seconds_per_usd` the Gateway's exchange
    rate between waiting and money.
    """

    name: str
    slot: int
    region: str = ""
    rank: int = 1
    limit: int = 0
    overflow_at: float = 1.0
    distance: int = 0  # 0 in the proxy's own region, 1 elsewhere
    paid_per_token: int = 0
    usd_per_unit: float = 0.0
    seconds_per_usd: float = 0.0


class CandidateState(msgspec.Struct):
    """How a candidate stands at the moment of the pick, for the request that is to be placed. To be read only.

    Units: `health` 0 to 1, breaker times slow start; `limit` in requests, as it is now, 0 for none; `units` in CU;
    `warm` the share of the prompt that was seen there before, 0 to 1; `usd` what the request costs there; `places`
    what its load is weighed against where it has no limit, 0 for nothing.
    """

    in_flight: int
    health: float
    limit: int = 0
    units: float = 1.0
    predicted: LatencyPrediction | None = None
    warm: float = 0.0
    usd: float = 0.0
    places: int = 0
    paused: bool = False

    @property
    def fit(self) -> LatencyPrediction | None:
        """How the request would do there, None where no Profile tells.

        Cost: predicted when it is first asked for, 2 µs; a strategy that can do without should.
        """
        return self.predicted

    @property
    def late(self) -> bool:
        """Whether the request would miss its SLO there."""
        fit = self.fit
        return fit is not None and fit.late != ""

    @property
    def harms_slo(self) -> bool:
        """Whether it would miss its SLO there, or make others miss theirs."""
        fit = self.fit
        return fit is not None and (fit.delays_others or fit.late != "")


Load = Mapping[int, CandidateState]  # by Deployment slot


class Ranking(NamedTuple):
    """A strategy's answer: whom to try, in order, and what to remember for the next request."""

    order: Sequence[Candidate]
    turn: Turn


Strategy = Callable[[Sequence[Candidate], Load, Turn], Ranking]
Lead = Callable[[Sequence[Candidate]], Candidate | None]


class Plugin(Protocol):
    """What a strategy's file gives: `order`, and perhaps `lead`."""

    order: Strategy


_registered: dict[str, Plugin] = {}


def register(name: str, plugin: Plugin) -> None:
    """Make a strategy from elsewhere known, as if its file were in the folder.

    Raises: `ValueError` when it has no `order` or the name is taken.
    """
    if not callable(getattr(plugin, "order", None)):
        raise ValueError("it has no function `order(candidates, load, turn)`")
    if name in _in_folder():
        raise ValueError(f"strategy {name} is built in and cannot be replaced; choose another name")
    if _registered.setdefault(name, plugin) is not plugin:
        raise ValueError(f"another strategy is called {name}; rename one of them")
    for remembered in (names, find, find_lead):
        remembered.cache_clear()


@cache
def names() -> tuple[str, ...]:
    """Every strategy there is, by name, in alphabetical order."""
    return tuple(sorted({*_in_folder(), *_registered}))


def _in_folder() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def _plugin(name: str) -> Plugin:
    plugin: Plugin = _registered.get(name) or importlib.import_module(f"{__name__}.{name}")
    return plugin


@cache
def find_lead(name: str) -> Lead:
    """The `lead` of a strategy; one that never names anybody where it has none."""
    lead: Lead = getattr(_plugin(name), "lead", _load_decides)
    return lead


def _load_decides(candidates: Sequence[Candidate]) -> Candidate | None:
    return None


@cache
def find(name: str) -> Strategy:
    """The strategy of a name.

    Raises: `KeyError` when there is none.
    """
    if name not in names():
        raise KeyError(f"no strategy {name!r}; there are: {', '.join(names())}")
    return _plugin(name).order
