"""The state of the candidates for one request: requests in flight, health and the latency predicted at each."""

from collections.abc import Mapping, Sequence
from math import inf

from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.deployment_view import DeploymentView
from fleetgate.core.capacity.latency_model import LatencyPrediction, RequestShape, idle_ttft_s, predict
from fleetgate.core.routing.strategies import Candidate, CandidateState, Load


def idle_ttft_min_s(shape: RequestShape, candidates: Sequence[Candidate], views: Mapping[int, DeploymentView]) -> float:
    """The TTFT of the fastest candidate if it were idle, 0 if no candidate has a Profile."""
    profiles = (views[candidate.slot].current_profile for candidate in candidates)
    return min((idle_ttft_s(profile, shape.prompt_tokens) for profile in profiles if profile is not None), default=0.0)


class CandidateLoad(CandidateState, kw_only=True):
    """The state of one candidate. What does not depend on the request is kept; latency is predicted when it is read."""

    loads: "CandidateLoads"
    slot: int
    usd_per_unit: float
    view: DeploymentView | None = None
    is_predicted: bool = False

    @property
    def prediction(self) -> LatencyPrediction | None:
        """The latency predicted for the current request at this Deployment."""
        if not self.is_predicted:
            self.predict()
        return self.predicted

    def predict(self) -> None:
        """Predict the latency of the current request."""
        loads, view = self.loads, self.view
        assert view is not None and loads.work_ledger is not None, "`refresh` comes before the first prediction"
        self.is_predicted = True
        self.predicted = (
            None if view.current_profile is None else best_prediction(loads.shape, view, loads.work_ledger, loads.now_s)
        )

    def update(self, view: DeploymentView) -> None:
        """Take a new view of the Deployment."""
        self.view = view
        self.health, self.limit, self.units = view.health, view.limit, view.units
        self.places, self.paused = view.slots, view.paused


class CandidateLoads:
    """The states of all candidates of one model route.

    The objects are reused from request to request: to make sixteen states costs as much as the rest of a decision. A
    Load is therefore valid only until the next `refresh`.
    """

    __slots__ = ("_has_price", "_has_warm", "_idle", "_states", "load", "now_s", "shape", "work_ledger")

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._states = [
            CandidateLoad(0, 0.0, loads=self, slot=candidate.slot, usd_per_unit=candidate.usd_per_unit)
            for candidate in candidates
        ]
        self._has_price = any(candidate.usd_per_unit for candidate in candidates)
        self._has_warm = False
        self._idle: set[tuple[float, float]] = set()
        self.load: Load = {state.slot: state for state in self._states}
        self.work_ledger: WorkLedger | None = None
        self.shape = RequestShape(0.0, 0.0)
        self.now_s = 0.0

    def refresh(self, views: Mapping[int, DeploymentView], work_ledger: WorkLedger, now_s: float) -> None:
        """Read the requests in flight and the current views. Cost: 0.2 µs a candidate."""
        changed = False
        in_flight_of = work_ledger.ledger.in_flight
        for state in self._states:
            slot = state.slot
            view = views[slot]
            if view is not state.view:
                state.update(view)
                changed = True
            state.in_flight = in_flight_of(slot) + view.external_in_flight
            state.is_predicted = False
        if changed:
            profiles = [state.view.current_profile for state in self._states if state.view is not None]
            self._idle = {(profile.rtt_s, profile.prompt_token_s) for profile in profiles if profile is not None}
        self.work_ledger, self.now_s = work_ledger, now_s

    def idle_ttft_min_s(self, prompt_tokens: float) -> float:
        """The TTFT of the fastest candidate if it were idle, 0 if no candidate has a Profile."""
        least_s = inf
        for rtt_s, token_s in self._idle:
            least_s = min(least_s, rtt_s + prompt_tokens * token_s)
        return least_s if least_s < inf else 0.0

    def for_request(self, shape: RequestShape) -> Load:
        """The states for one request."""
        self.shape = shape
        if self._has_price:
            units = shape.units
            for state in self._states:
                state.usd = state.usd_per_unit * units
        if shape.warm_tokens or self._has_warm:
            self._has_warm = bool(shape.warm_tokens)
            for state in self._states:
                state.warm = _warm_share(shape, state.view)
        return self.load

    def predict_all(self) -> None:
        """Predict at every candidate now, for a reader that comes after the load has changed."""
        for state in self._states:
            state.predict()


def _warm_share(shape: RequestShape, view: DeploymentView | None) -> float:
    """The share of a prompt that an Endpoint of this Deployment saw before."""
    if not shape.warm_tokens or view is None:
        return 0.0
    is_warm = any(endpoint.endpoint_slot == shape.warm_slot for endpoint in view.endpoints)
    return min(1.0, shape.warm_tokens / shape.prompt_tokens) if is_warm else 0.0


def best_prediction(
    shape: RequestShape, view: DeploymentView, work_ledger: WorkLedger, now_s: float
) -> LatencyPrediction | None:
    """The prediction at the Deployment's best Endpoint, which is the one with the least token work."""
    profile, endpoints = view.current_profile, view.endpoints
    assert profile is not None
    if len(endpoints) == 1:
        endpoint_slot, engines = endpoints[0]
        work = work_ledger.work_at(endpoint_slot, profile.prompt_token_s, profile.window_s, now_s)
        return predict(shape, profile, endpoint_slot, engines, work)
    chosen, chosen_work, least_s = None, None, inf
    for endpoint in endpoints:
        endpoint_slot, engines = endpoint
        work = work_ledger.work_at(endpoint_slot, profile.prompt_token_s, profile.window_s, now_s)
        own = shape.uncached_at(endpoint_slot) if endpoint_slot == shape.warm_slot else shape.prompt_tokens
        ahead_s = ((work[0] + own + work[3]) * profile.prompt_token_s + work[1] * profile.sequence_s) / engines
        if ahead_s < least_s:
            chosen, chosen_work, least_s = endpoint, work, ahead_s
    if chosen is None or chosen_work is None:
        return None
    return predict(shape, profile, chosen.endpoint_slot, chosen.engines, chosen_work)
