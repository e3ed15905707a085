"""How the candidates stand for one request: what they have in flight, how fit they are, and how it would do at each."""

from collections.abc import Mapping, Sequence
from math import inf

from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.deployment_view import DeploymentView
from fleetgate.core.capacity.latency_model import LatencyPrediction, RequestShape, idle_ttft_s, predict
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load


def idle_ttft_min_s(
    need: RequestShape, candidates: Sequence[Candidate], outlooks: Mapping[int, DeploymentView]
) -> float:
    """The TTFT of the fastest candidate if it had nothing else to do, 0 where nothing is known."""
    speeds = (outlooks[candidate.slot].current_profile for candidate in candidates)
    return min((idle_ttft_s(speed, need.prompt_tokens) for speed in speeds if speed is not None), default=0.0)


class CandidateLoad(CandidateState, kw_only=True):
    """A candidate. What does not depend on the request is kept; latency is predicted when read."""

    loads: "CandidateLoads"
    slot: int
    usd_per_unit: float
    view: DeploymentView | None = None
    predicted_now: bool = False

    @property
    def fit(self) -> LatencyPrediction | None:
        """How the request at hand would do there."""
        if not self.predicted_now:
            self.predict()
        return self.predicted

    def predict(self) -> None:
        """Predict it."""
        scene, outlook = self.loads, self.view
        assert outlook is not None and scene.work_ledger is not None, "a scene is set before it is asked"
        self.predicted_now = True
        self.predicted = (
            None
            if outlook.current_profile is None
            else best_prediction(scene.shape, outlook, scene.work_ledger, scene.now_s)
        )

    def update(self, outlook: DeploymentView) -> None:
        """The proxy looked again."""
        self.view = outlook
        self.health, self.limit, self.units = outlook.health, outlook.limit, outlook.units
        self.places, self.paused = outlook.slots, outlook.paused


class CandidateLoads:
    """The candidates of one Lane before the request at hand.

    One scene is set anew for each request, because making the standings of sixteen candidates costs as much as all the
    rest of a decision; so a Load is true until the next `set`.
    """

    __slots__ = ("_idle", "_priced", "_warmed", "_watched", "load", "now_s", "shape", "work_ledger")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._watched = [
            CandidateLoad(0, 0.0, loads=self, slot=candidate.slot, usd_per_unit=candidate.usd_per_unit)
            for candidate in candidates
        ]
        self._priced = any(candidate.usd_per_unit for candidate in candidates)
        self._warmed = False
        self._idle: set[tuple[float, float]] = set()
        self.load: Load = {watched.slot: watched for watched in self._watched}
        self.work_ledger: WorkLedger | None = None
        self.shape = RequestShape(0.0, 0.0)
        self.now_s = 0.0

    def refresh(self, outlooks: Mapping[int, DeploymentView], books: WorkLedger, now_s: float) -> None:
        """What everybody has in flight, and what the proxy saw since. Cost: 0.2 µs a candidate."""
        renewed = False
        in_flight_of = books.ledger.in_flight
        for watched in self._watched:
            slot = watched.slot
            outlook = outlooks[slot]
            if outlook is not watched.view:
                watched.update(outlook)
                renewed = True
            watched.in_flight = in_flight_of(slot) + outlook.external_in_flight
            watched.predicted_now = False
        if renewed:
            speeds = [watched.view.current_profile for watched in self._watched if watched.view is not None]
            self._idle = {(speed.rtt_s, speed.prompt_token_s) for speed in speeds if speed is not None}
        self.work_ledger, self.now_s = books, now_s

    def idle_ttft_min_s(self, prompt_tokens: float) -> float:
        """The TTFT of the fastest candidate if it had nothing else to do, 0 where nothing is known."""
        least_s = inf
        for rtt_s, token_s in self._idle:
            least_s = min(least_s, rtt_s + prompt_tokens * token_s)
        return least_s if least_s < inf else 0.0

    def for_request(self, need: RequestShape) -> Load:
        """How each stands for this request."""
        self.shape = need
        if self._priced:
            units = need.units
            for watched in self._watched:
                watched.usd = watched.usd_per_unit * units
        if need.warm_tokens or self._warmed:
            self._warmed = bool(need.warm_tokens)
            for watched in self._watched:
                watched.warm = _warm(need, watched.view)
        return self.load

    def predict_all(self) -> None:
        """Have every fit known now, for somebody who reads them later."""
        for watched in self._watched:
            watched.predict()


def _warm(need: RequestShape, outlook: DeploymentView | None) -> float:
    """The share of a prompt that somebody there has seen."""
    if not need.warm_tokens or outlook is None:
        return 0.0
    seen = any(seat.endpoint_slot == need.warm_slot for seat in outlook.endpoints)
    return min(1.0, need.warm_tokens / need.prompt_tokens) if seen else 0.0


def best_prediction(
    need: RequestShape, outlook: DeploymentView, books: WorkLedger, now_s: float
) -> LatencyPrediction | None:
    """How the request would do at the Deployment's best Endpoint, which is the one with the least token work."""
    speed, seats = outlook.current_profile, outlook.endpoints
    assert speed is not None
    if len(seats) == 1:
        endpoint_slot, engines = seats[0]
        work = books.work_at(endpoint_slot, speed.prompt_token_s, speed.window_s, now_s)
        return predict(need, speed, endpoint_slot, engines, work)
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
    return predict(need, speed, chosen.endpoint_slot, chosen.engines, chosen_work)
