"""What a worker believes of a Deployment when its Snapshot changes."""

import msgspec

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.admission.work_ledger import WorkLedger
from fleetgate.core.model import Deployment, Endpoint, Snapshot
from fleetgate.ipc.shared_memory import SharedMemory
from fleetgate.proxy.routing.capacity_tracker import CapacityTracker
from fleetgate.proxy.routing.deployment_state import DeploymentState
from fleetgate.proxy.routing.endpoint_state import EndpointState
from fleetgate.proxy.transport.connection_pool import ConnectionPool

ENDPOINT = Endpoint(slot=0, scheme="http", host="127.0.0.1", port=1, base_path="/v1")
SMALL = Deployment(
    slot=0,
    name="a",
    region="r",
    engine="vllm",
    models={"m": "m"},
    endpoints=(ENDPOINT,),
    concurrency_max=1,
    concurrency_written=True,
)


def limit_after(learning: CapacityTracker, deployment: Deployment, now_ms: int) -> int:
    """What requests read once this Deployment is in the Snapshot."""
    learning.use(Snapshot(version=1, made_at_s=0.0, deployments=(deployment,)))
    place = DeploymentState(deployment, [EndpointState(ENDPOINT, ConnectionPool(ENDPOINT, None, None))], {})
    learning.update_view(place, now_ms)
    assert place.limit == learning.views[0].limit
    return place.limit


def test_a_limit_that_was_changed_holds_at_once_in_every_worker() -> None:
    """What was learned of the old one is still fresh on the board, and must not be taken for the new one's."""
    board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(2))), 2)
    leader, other = (CapacityTracker(board, WorkLedger(board, n, Ledger(board, n))) for n in (0, 1))
    for learning in (leader, other):
        assert limit_after(learning, SMALL, 1_000) == 1
    list(leader.correct_limits(1_000))
    raised = msgspec.structs.replace(SMALL, concurrency_max=8)
    assert limit_after(leader, raised, 1_500) == 8
    assert limit_after(other, raised, 1_500) == 8


def test_the_others_read_what_the_leader_learned() -> None:
    board = SharedMemory(memoryview(bytearray(SharedMemory.bytes_needed(2))), 2)
    leader, other = (CapacityTracker(board, WorkLedger(board, n, Ledger(board, n))) for n in (0, 1))
    wide = msgspec.structs.replace(SMALL, concurrency_max=100)
    for learning in (leader, other):
        assert limit_after(learning, wide, 1_000) == 100
    list(leader.correct_limits(1_000))
    board.deployment_counters[3] = 50  # the engine refused fifty
    list(leader.correct_limits(2_000))
    assert limit_after(leader, wide, 2_100) < 100
    assert limit_after(other, wide, 2_100) == limit_after(leader, wide, 2_100)
    assert limit_after(other, wide, 9_000) < 100, "a leader that is gone leaves what it learned"
