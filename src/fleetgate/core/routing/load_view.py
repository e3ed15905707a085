"""How the candidates stand for one request: what they have in flight, how fit they are, and how it would do at each."""

from collections.abc import Mapping, Sequence
from math import inf

from fleetgate.core.admission.work_ledger import Books
from fleetgate.core.capacity.deployment_view import Outlook
from fleetgate.core.capacity.latency_model import Fit, Need, fit, idle_ttft_s
from fleetgate.core.routing.strategies import Candidate, Load, Standing

COOLING = 1_000_000  # requests of others, more than any limit: its engine has asked to be left alone for a while


def least_idle_s(need: Need, candidates: Sequence[Candidate], outlooks: Mapping[int, Outlook]) -> float:
    """The TTFT of the fastest candidate if it had nothing else to do, 0 where nothing is known."""
    speeds = (outlooks[candidate.slot].speed for candidate in candidates)
    return min((idle_ttft_s(speed, need.prompt_tokens) for speed in speeds if speed is not None), default=0.0)


class Watched(Standing, kw_only=True):
    """A candidate in a `Scene`: what does not depend on the request is kept, its fit predicted when it is asked for."""

    scene: "Scene"
    slot: int
    usd_per_unit: float
    outlook: Outlook | None = None
    asked: bool = False

    @property
    def fit(self) -> Fit | None:
        """How the request at hand would do there."""
        if not self.asked:
            self.ask()
        return self.predicted

    def ask(self) -> None:
        """Predict it."""
        scene, outlook = self.scene, self.outlook
        assert outlook is not None and scene.books is not None, "a scene is set before it is asked"
        self.asked = True
        self.predicted = None if outlook.speed is None else best_fit(scene.need, outlook, scene.books, scene.now_s)

    def renew(self, outlook: Outlook) -> None:
        """The proxy looked again."""
        self.outlook = outlook
        self.health, self.limit, self.units = outlook.health, outlook.limit, outlook.units
        self.places = outlook.places


class Scene:
    """The candidates of one Lane before the request at hand.

    One scene is set anew for each request, because making the standings of sixteen candidates costs as much as all the
    rest of a decision; so a Load is true until the next `set`.
    """

    __slots__ = ("_idle", "_priced", "_warmed", "_watched", "books", "load", "need", "now_s")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._watched = [
            Watched(0, 0.0, scene=self, slot=candidate.slot, usd_per_unit=candidate.usd_per_unit)
            for candidate in candidates
        ]
        self._priced = any(candidate.usd_per_unit for candidate in candidates)
        self._warmed = False
        self._idle: set[tuple[float, float]] = set()
        self.load: Load = {watched.slot: watched for watched in self._watched}
        self.books: Books | None = None
        self.need = Need(0.0, 0.0)
        self.now_s = 0.0

    def set(self, outlooks: Mapping[int, Outlook], books: Books, now_s: float) -> None:
        """What everybody has in flight, and what the proxy saw since. Cost: 0.2 µs a candidate."""
        renewed = False
        in_flight_of = books.ledger.in_flight
        for watched in self._watched:
            slot = watched.slot
            outlook = outlooks[slot]
            if outlook is not watched.outlook:
                watched.renew(outlook)
                renewed = True
            watched.in_flight = in_flight_of(slot) + outlook.foreign
            watched.asked = False
        if renewed:
            speeds = [watched.outlook.speed for watched in self._watched if watched.outlook is not None]
            self._idle = {(speed.rtt_s, speed.prompt_token_s) for speed in speeds if speed is not None}
        self.books, self.now_s = books, now_s

    def least_idle_s(self, prompt_tokens: float) -> float:
        """The TTFT of the fastest candidate if it had nothing else to do, 0 where nothing is known."""
        least_s = inf
        for rtt_s, token_s in self._idle:
            least_s = min(least_s, rtt_s + prompt_tokens * token_s)
        return least_s if least_s < inf else 0.0

    def ask(self, need: Need) -> Load:
        """How each stands for this request."""
        self.need = need
        if self._priced:
            units = need.units
            for watched in self._watched:
                watched.usd = watched.usd_per_unit * units
        if need.warm_tokens or self._warmed:
            self._warmed = bool(need.warm_tokens)
            for watched in self._watched:
                watched.warm = _warm(need, watched.outlook)
        return self.load

    def predict(self) -> None:
        """Have every fit known now, for somebody who reads them later."""
        for watched in self._watched:
            watched.ask()


def _warm(need: Need, outlook: Outlook | None) -> float:
    """The share of a prompt that somebody there has seen."""
    if not need.warm_tokens or outlook is None:
        return 0.0
    seen = any(seat.endpoint_slot == need.warm_slot for seat in outlook.seats)
    return min(1.0, need.warm_tokens / need.prompt_tokens) if seen else 0.0


def best_fit(need: Need, outlook: Outlook, books: Books, now_s: float) -> Fit | None:
    """How the request would do at the Deployment's best Endpoint, which is the one with the least token work."""
    speed, seats = outlook.speed, outlook.seats
    assert speed is not None
    if len(seats) == 1:
        endpoint_slot, engines = seats[0]
        work = books.work_at(endpoint_slot, speed.prompt_token_s, speed.window_s, now_s)
        return fit(need, speed, endpoint_slot, engines, work)
    chosen, chosen_work, least_s = None, None, float("inf")
    for seat in seats:
        endpoint_slot, engines = seat
        work = books.work_at(endpoint_slot, speed.prompt_token_s, speed.window_s, now_s)
        prompts = work[0] + (need.uncached_at(endpoint_slot) if endpoint_slot == need.warm_slot else need.prompt_tokens)
        ahead_s = ((prompts + work[3]) * speed.prompt_token_s + work[1] * speed.sequence_s) / engines
        if ahead_s < least_s:
            chosen, chosen_work, least_s = seat, work, ahead_s
    if chosen is None or chosen_work is None:
        return None
    return fit(need, speed, chosen.endpoint_slot, chosen.engines, chosen_work)
