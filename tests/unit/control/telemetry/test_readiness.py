"""What the control process reads off the board: series, readiness, Events, replicas carried over a restart."""

from fleetgate.control.context import StartedProcess
from fleetgate.control.snapshot.replica_endpoints import ReplicaEndpoints
from fleetgate.control.telemetry.event_recorder import EventRecorder
from fleetgate.control.telemetry.readiness import reasons_against
from fleetgate.core.model import Deployment, Endpoint, Snapshot
from fleetgate.ipc.shared_memory import EndpointSignal, WorkerCell
from fleetgate.providers.base import ManagedDeployment, ReplicaWorkload
from tests.loopback.control_rig import board_of


def deployment(name: str, slot: int, *endpoint_slots: int) -> Deployment:
    endpoints = tuple(
        Endpoint(slot=at, scheme="http", host="127.0.0.1", port=8000 + at, base_path="/v1") for at in endpoint_slots
    )
    return Deployment(slot=slot, name=name, region="r", engine="vllm", models={"m": "m"}, endpoints=endpoints)


def test_readiness_gives_every_reason() -> None:
    board = board_of(2)
    snapshot = Snapshot(version=7, made_at_s=0.0, deployments=(deployment("a", 0, 0, 1), deployment("b", 1)))
    started = StartedProcess(7, 100.0)
    assert reasons_against(board, 2, None, started, 100.0)
    board.set(0, WorkerCell.ACCEPTING, 1)
    board.set(0, WorkerCell.SNAPSHOT_VERSION, 6)
    reasons = reasons_against(board, 2, snapshot, started, 101.9)
    assert [reason.split(" ")[:2] for reason in reasons] == [
        ["1", "of"],
        ["worker", "0"],
        ["Deployment", "a"],
        ["Deployment", "b"],
    ]
    for worker in range(2):
        board.set(worker, WorkerCell.ACCEPTING, 1)
        board.set(worker, WorkerCell.SNAPSHOT_VERSION, 8)
    board.set_signal(1, EndpointSignal.SEEN_MS, 5)
    assert [reason.split(" ")[1] for reason in reasons_against(board, 2, snapshot, started, 101.9)] == ["b"]
    assert reasons_against(board, 2, snapshot, started, 102.0) == []


UP = "Deployment a is up"


def test_a_deployment_is_down_only_when_all_its_endpoints_are() -> None:
    board = board_of()
    snapshot = Snapshot(version=1, made_at_s=0.0, deployments=(deployment("a", 0, 0, 1),))
    watcher = EventRecorder(board)

    def signal(slot: int, up: int) -> list[str]:
        board.set_signal(slot, EndpointSignal.SEEN_MS, 1)
        board.set_signal(slot, EndpointSignal.UP, up)
        return [sentence for _, _, sentence in watcher.changes(snapshot)]

    assert list(watcher.changes(snapshot)) == []
    assert signal(0, 0) == [f"{UP}: it answers its readiness probe."]  # the other one counts as up until probed
    assert signal(1, 0) == [
        "Deployment a is down: none of its 2 Endpoints answers the readiness probe; it gets no requests until one does."
    ]
    assert signal(1, 0) == []
    assert signal(0, 1) == [f"{UP} again: it answers its readiness probe."]
    assert signal(1, 1) == []


def test_replicas_are_carried_over_a_restart_only_while_workers_serve() -> None:
    last = Snapshot(version=1, made_at_s=0.0, deployments=(deployment("own", 0, 0), deployment("external", 1, 1)))
    own = ManagedDeployment(
        name="own",
        cluster="c",
        provider="local",
        region="r",
        workload=ReplicaWorkload(command=("x",)),
        replicas_desired=1,
    )
    seen: dict[str, tuple[str, ...]] = {}
    board = board_of()
    replicas = ReplicaEndpoints(lambda: seen)
    replicas.carry(last, (own,), board)
    assert replicas.ready() == {}
    board.set(0, WorkerCell.ACCEPTING, 1)
    replicas.carry(last, (own,), board)
    assert replicas.ready() == {"own": ("http://127.0.0.1:8000/v1",)}
    seen["own"] = ("http://127.0.0.1:9999/v1",)
    assert replicas.ready() == {"own": ("http://127.0.0.1:9999/v1",)}
