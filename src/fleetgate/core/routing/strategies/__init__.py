"""Load balancing strategies, one file each, found by the name of the file.

A file has one function, `order(candidates, load, turn) -> Ranking`: the candidates in the order in which they are
tried. Every candidate it gets is up and has capacity; a candidate that it leaves out is not tried now. The SLO is
checked afterwards: if the first choice would miss it, the strategy is called again with the candidates that would not.
A strategy is pure: it returns what it must remember as `Ranking.turn` and gets that back as `turn`.

A file may also have `lead(candidates)`: the candidate that is always first while it is healthy and below its spill
limit, whatever the load of the others; None if the load decides. With a lead most requests need no call of `order`.
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

    Units: `limit` in requests as written in the Snapshot, 0 for none; `paid_per_token` 1 if the price is per token, 0
    if it is per hour; `usd_per_unit` the price of a reference request; `seconds_per_usd` the Gateway's exchange rate
    between waiting time and money.
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
    """The state of a candidate at the decision, for the request to be placed. Strategies only read it.

    Units: `in_flight` in requests; `health` 0 to 1, breaker times slow start; `limit` in requests, the current one, 0
    for none; `units` in CU; `warm` the share of the prompt that was seen there before, 0 to 1; `usd` the price of the
    request there; `places` the concurrency that the load is compared with if there is no limit, 0 for unknown.
    Shape: `paused` is set while the engine asks for no requests; such a candidate is full whatever its limit.
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
    def prediction(self) -> LatencyPrediction | None:
        """The latency predicted for the request at this Deployment, None without a Profile.

        Cost: 2 µs at the first read, when it is predicted; a strategy that needs no prediction should not read it.
        """
        return self.predicted

    @property
    def fit(self) -> LatencyPrediction | None:
        """Old name of `prediction`, which installed strategy plug-ins still read."""
        return self.prediction

    @property
    def late(self) -> bool:
        """Whether the request would miss its SLO there."""
        prediction = self.prediction
        return prediction is not None and prediction.late != ""

    @property
    def harms_slo(self) -> bool:
        """Whether the request would miss its SLO there, or make other requests miss theirs."""
        prediction = self.prediction
        return prediction is not None and (prediction.delays_others or prediction.late != "")

    @property
    def unwelcome(self) -> bool:
        """Old name of `harms_slo`, which installed strategy plug-ins still read."""
        return self.harms_slo


Load = Mapping[int, CandidateState]  # by Deployment slot


class Ranking(NamedTuple):
    """A strategy's result: the candidates to try, in order, and its memory for the next request."""

    order: Sequence[Candidate]
    turn: Turn


Strategy = Callable[[Sequence[Candidate], Load, Turn], Ranking]
Lead = Callable[[Sequence[Candidate]], Candidate | None]


class Plugin(Protocol):
    """What a strategy's file has: `order`, and optionally `lead`."""

    order: Strategy


_registered: dict[str, Plugin] = {}


def register(name: str, plugin: Plugin) -> None:
    """Add a strategy from another package, as if its file were in the folder.

    Raises: `ValueError` if it has no `order` or the name is taken.
    """
    if not callable(getattr(plugin, "order", None)):
        raise ValueError("the strategy has no function `order(candidates, load, turn)`; add one")
    if name in _in_folder():
        raise ValueError(f"strategy {name} is built in and cannot be replaced; choose another name")
    if _registered.setdefault(name, plugin) is not plugin:
        raise ValueError(f"another strategy is called {name}; rename one of them")
    for cached in (names, find, find_lead):
        cached.cache_clear()


@cache
def names() -> tuple[str, ...]:
    """The names of all strategies, sorted."""
    return tuple(sorted({*_in_folder(), *_registered}))


def _in_folder() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def _plugin(name: str) -> Plugin:
    plugin: Plugin = _registered.get(name) or importlib.import_module(f"{__name__}.{name}")
    return plugin


@cache
def find_lead(name: str) -> Lead:
    """The `lead` of a strategy, or a function that always returns None if it has none."""
    lead: Lead = getattr(_plugin(name), "lead", _load_decides)
    return lead


def _load_decides(candidates: Sequence[Candidate]) -> Candidate | None:
    return None


@cache
def find(name: str) -> Strategy:
    """The strategy of that name.

    Raises: `KeyError` if there is none.
    """
    if name not in names():
        raise KeyError(f"no strategy {name!r}; there are: {', '.join(names())}")
    return _plugin(name).order
