"""The state of the candidates: read anew for each request, predicted only when it is read."""

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.work_ledger import WorkLedger, WorkReservation
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.capacity.online_estimate import GUESS, Observation, OnlineEstimate
from fleetgate.core.model import Slo
from fleetgate.core.routing.load_view import CandidateLoad, CandidateLoads, best_prediction, idle_ttft_min_s
from fleetgate.core.routing.strategies import Candidate
from fleetgate.ipc.shared_memory import SharedMemory
from tests.loopback.rig import deployment

CANDIDATES = (Candidate(name="a", slot=0, usd_per_unit=2.0), Candidate(name="b", slot=1))
SHAPE = RequestShape(1000.0, 200.0)


def work_ledger() -> WorkLedger:
    memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
    return WorkLedger(memory, 0, Ledger(memory, 0))


def profiled(slot: int, *endpoints: int) -> DeploymentView:
    estimate = OnlineEstimate(deployment("d", 8001, slot, profile=GUESS), Slo())
    return estimate.view(Observation(1.0, tuple(EndpointCapacity(endpoint) for endpoint in endpoints)))


def test_a_state_has_the_view_and_all_requests_in_flight() -> None:
    ledger, loads = work_ledger(), CandidateLoads(CANDIDATES)
    ledger.reserve(WorkReservation(1, 1), 0, 0.0)
    views = {0: DeploymentView(0.5, 7, units=3.0, paused=True), 1: DeploymentView(1.0, external_in_flight=4, slots=9)}
    loads.refresh(views, ledger, 0.0)
    a, b = loads.load[0], loads.load[1]
    assert (a.in_flight, a.health, a.limit, a.units, a.paused) == (0, 0.5, 7, 3.0, True)
    assert (b.in_flight, b.limit, b.places, b.paused) == (5, 0, 9, False)
    loads.refresh({**views, 0: DeploymentView(1.0, 7)}, ledger, 0.0)
    assert not a.paused and a.health == 1.0


def test_price_and_warmth_are_those_of_the_request() -> None:
    ledger, loads = work_ledger(), CandidateLoads(CANDIDATES)
    views = {slot: DeploymentView(1.0, endpoints=(EndpointCapacity(slot),)) for slot in (0, 1)}
    loads.refresh(views, ledger, 0.0)
    load = loads.for_request(SHAPE._replace(warm_slot=1, warm_tokens=500.0))
    assert (load[0].usd, load[1].usd) == (2.0, 0.0), "the reference request costs one CU"
    assert (load[0].warm, load[1].warm) == (0.0, 0.5)
    assert loads.for_request(SHAPE)[1].warm == 0.0, "nothing is left over from the request before"


def test_latency_is_predicted_at_the_first_read_and_only_with_a_profile() -> None:
    ledger, loads = work_ledger(), CandidateLoads(CANDIDATES)
    loads.refresh({0: profiled(0, 0), 1: DeploymentView(1.0)}, ledger, 0.0)
    load = loads.for_request(SHAPE)
    state = load[0]
    assert isinstance(state, CandidateLoad) and not state.is_predicted
    prediction = state.prediction
    assert prediction is not None and prediction is state.prediction and prediction.ttft_s >= 1000 / 8000
    assert load[1].prediction is None


def test_the_best_endpoint_has_the_least_work() -> None:
    ledger, view = work_ledger(), profiled(0, 3, 4)
    ledger.reserve(WorkReservation(0, 3, 5000), 0, 0.0)
    best = best_prediction(SHAPE, view, ledger, 0.0)
    assert best is not None and best.endpoint_slot == 4
    warm = best_prediction(SHAPE._replace(warm_slot=3, warm_tokens=999.0), view, ledger, 0.0)
    assert warm is not None and warm.endpoint_slot == 4, "a warm prefix does not outweigh a long queue"


def test_the_idle_ttft_is_that_of_the_fastest_with_a_profile() -> None:
    loads, views = CandidateLoads(CANDIDATES), {0: profiled(0, 0), 1: DeploymentView(1.0)}
    loads.refresh(views, work_ledger(), 0.0)
    assert loads.idle_ttft_min_s(1000.0) == idle_ttft_min_s(SHAPE, CANDIDATES, views) == 1000 / 8000
    assert idle_ttft_min_s(SHAPE, CANDIDATES[1:], views) == 0.0
