"""The scheduler: it chooses a Deployment, reserves capacity there, and remembers only what a decision used."""

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.request_queue import Priority
from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.capacity.deployment_view import DeploymentView, EndpointCapacity
from fleetgate.core.capacity.latency_model import RequestShape
from fleetgate.core.model import Admission, Slo, Snapshot
from fleetgate.core.routing.route import Rejection, RejectionReason, model_routes
from fleetgate.core.routing.scheduler import Placement, Scheduler, ScheduleRequest, limit_for_priority, preferred_first
from fleetgate.ipc.shared_memory import SharedMemory
from tests.loopback.rig import deployment, gateway

SHAPE = RequestShape(100.0, 50.0)
REQUEST = ScheduleRequest(SHAPE)


class Fleet:
    """Two Deployments behind one Gateway, the first preferred by rank."""

    def __init__(self, **options: object) -> None:
        snapshot = Snapshot(
            version=1,
            made_at_s=0.0,
            gateways=(gateway("one", "two", **options),),
            deployments=(deployment("one", 8001, 0), deployment("two", 8002, 1)),
        )
        route = model_routes(snapshot.gateways[0], snapshot, "")["m"]
        self.scheduler = Scheduler(snapshot.gateways[0], route)
        memory = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(1))), 1)
        self.ledger = WorkLedger(memory, 0, Ledger(memory, 0))
        self.views = {slot: DeploymentView(1.0, 2, endpoints=(EndpointCapacity(slot),)) for slot in (0, 1)}

    def place(self, request: ScheduleRequest = REQUEST, tried: tuple[int, ...] = ()) -> Placement | Rejection:
        return self.scheduler.place(request, self.views, self.ledger, 1.0, tried)

    def names(self, count: int, request: ScheduleRequest = REQUEST) -> list[str]:
        placed = [self.place(request) for _ in range(count)]
        return [one.candidate.name if isinstance(one, Placement) else str(one.reason) for one in placed]


def test_requests_fill_the_first_rank_then_the_second_then_are_rejected() -> None:
    fleet = Fleet()
    assert fleet.names(5) == ["one", "one", "two", "two", "all_full"]


def test_a_settled_reservation_is_free_again() -> None:
    fleet = Fleet()
    placed = fleet.place()
    assert isinstance(placed, Placement)
    assert fleet.ledger.ledger.in_flight(0) == fleet.ledger.sequences(0) == 1
    fleet.ledger.settle(placed.reservation)
    assert fleet.ledger.ledger.in_flight(0) == fleet.ledger.sequences(0) == 0


def test_a_paused_deployment_without_a_limit_gets_no_request() -> None:
    fleet = Fleet()
    fleet.views[0] = DeploymentView(1.0, 0, endpoints=(EndpointCapacity(0),), paused=True)
    assert fleet.names(3) == ["two", "two", "all_full"]


def test_requests_of_others_count_against_the_limit() -> None:
    fleet = Fleet()
    fleet.views[0] = DeploymentView(1.0, 2, external_in_flight=1, endpoints=(EndpointCapacity(0),))
    assert fleet.names(3) == ["one", "two", "two"]


def test_policies_restrict_and_prefer() -> None:
    fleet = Fleet()
    assert fleet.names(1, REQUEST._replace(preferred=(1,))) == ["two"]
    assert fleet.names(2, REQUEST._replace(allowed=frozenset({1}))) == ["two", "all_full"]


def test_tried_deployments_are_excluded() -> None:
    rejection = Fleet().place(tried=(0, 1))
    assert isinstance(rejection, Rejection) and rejection.reason is RejectionReason.ALL_TRIED
    assert dict(rejection.excluded) == {"one": "tried already", "two": "tried already"}


def test_sheddable_requests_use_a_part_of_the_limit() -> None:
    fleet = Fleet()
    assert fleet.names(3, REQUEST._replace(priority=Priority.SHEDDABLE)) == ["one", "two", "all_full"]
    assert limit_for_priority(Priority.SHEDDABLE, 0) == 0 and limit_for_priority(Priority.STANDARD, 10) == 10


def test_the_last_decision_is_kept_only_if_decisions_are_recorded() -> None:
    fleet = Fleet()
    fleet.place()
    assert fleet.scheduler.last_decision is None
    fleet.scheduler.records_decisions = True
    fleet.place()
    decision = fleet.scheduler.last_decision
    assert decision is not None and [c.name for c in decision.candidates] == ["one", "two"]


def test_a_request_waits_at_most_the_least_of_its_limits() -> None:
    fleet = Fleet(admission=Admission(queue_timeout_s=5.0))
    assert fleet.scheduler.queue_deadline_s(SHAPE, 10.0, fleet.views) == 15.0
    assert fleet.scheduler.queue_deadline_s(SHAPE, 10.0, fleet.views, timeout_s=2.0) == 12.0
    strict = Fleet(slo=Slo(ttft_s=1.0, ttft_s_per_1k_tokens=0.0))
    assert strict.scheduler.queue_deadline_s(SHAPE, 10.0, strict.views) == 10.9, "0.9 of the TTFT target"


def test_preferred_first_keeps_the_order_of_the_rest() -> None:
    candidates = Fleet().scheduler.route.candidates
    assert preferred_first(candidates, ()) is candidates
    assert [c.name for c in preferred_first(candidates, (1,))] == ["two", "one"]
