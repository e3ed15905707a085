"""The parts of a worker around its requests: generations, ids, errors, Snapshots and ticks."""

import mmap
import os
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleetgate.core.admission.ledger import Ledger
from fleetgate.core.model import Snapshot, encode_snapshot
from fleetgate.ipc.event_spool import EventSpool
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell
from fleetgate.ipc.signed_file import SNAPSHOT, sign
from fleetgate.proxy.worker.activation import LOAD_FRESH_MS, TableActivator
from fleetgate.proxy.worker.assembly import DataPlane
from fleetgate.proxy.worker.config import WorkerConfig
from fleetgate.proxy.worker.error_boundary import ErrorBoundary
from fleetgate.proxy.worker.generations import Generations
from fleetgate.proxy.worker.services import request_ids
from fleetgate.proxy.worker.snapshots import WorkerSnapshots
from fleetgate.proxy.worker.ticker import SECOND_TICKS, Ticker
from fleetgate.proxy.worker.worker import WorkerProcess
from tests.conformance.transport_rig import BODY, whole
from tests.loopback.control_rig import board_of
from tests.loopback.rig import deployment, gateway
from tests.unit.proxy.plane_rig import Plane, status_of

# --- generations ---


def generation(shared: SharedMemory, worker: int) -> tuple[Generations, list[range]]:
    columns: list[range] = []
    made = Generations(shared, worker, 2, Ledger(shared, worker))
    made.follow(columns.append)
    return made, columns


def test_alone_a_worker_counts_with_its_own_half() -> None:
    made, columns = generation(board_of(4), 1)
    assert columns == [range(4)], "all columns is always right"
    made.tick()
    assert columns[-1] == range(2)


def test_no_worker_serves_before_all_of_the_other_generation_count_with_it() -> None:
    shared = board_of(4)
    old, old_columns = generation(shared, 0)
    shared.set(0, WorkerCell.DUTY, 1)
    old.tick()
    assert old_columns[-1] == range(2)
    new, _ = generation(shared, 2)
    shared.set(2, WorkerCell.DUTY, 1)
    assert not new.may_serve()
    old.tick()
    assert new.may_serve() and old_columns[-1] == range(4)
    shared.set(0, WorkerCell.SNAPSHOT_VERSION, 7)
    assert new.newest_version() == 7
    shared.set(0, WorkerCell.DUTY, 0)
    new.tick()
    assert new.may_serve()


# --- ids and errors ---


def test_ids_of_two_workers_differ() -> None:
    first, second = (list(islice(request_ids(), 1000)) for _ in range(2))
    assert len({*first, *second}) == 2000 and all(one.startswith(b"req_") for one in first)


def test_an_error_is_counted_and_its_place_logged_but_not_its_words(
    plane: Plane, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise ValueError("sk-secret")

    boundary = plane.services.boundary
    assert isinstance(boundary, ErrorBoundary)
    boundary.run(work)
    boundary.on_loop_error({"exception": ValueError("sk-secret")})
    boundary.on_loop_error({"message": "a task was lost"})
    plane.services._machine.log.drain()
    logged = capfd.readouterr().err
    assert plane.metric("fleetgate_internal_errors_total") == 2
    assert "sk-secret" not in logged and "in work" in logged and "a task was lost" in logged


# --- Snapshots ---


def publish(plane: Plane, version: int, **fields: Any) -> None:
    spec = gateway("one", default=True, **fields)
    snapshot = Snapshot(
        version=version, made_at_s=float(version), gateways=(spec,), deployments=(deployment("one", 8001, 0),)
    )
    fresh = plane.data_dir / "fresh"
    fresh.write_bytes(sign(encode_snapshot(snapshot), b"k" * 32))
    fresh.rename(plane.data_dir / SNAPSHOT)


def test_a_snapshot_file_is_used_and_a_damaged_one_is_not(plane: Plane, capfd: pytest.CaptureFixture[str]) -> None:
    snapshots = plane.services.snapshots
    assert isinstance(snapshots, WorkerSnapshots)
    publish(plane, 50)
    plane.loop.call_soon(snapshots.start, plane.loop.time())
    plane.run()
    assert plane.services.active.current.version == 50 == plane.shared.get(0, WorkerCell.SNAPSHOT_VERSION)
    (plane.data_dir / SNAPSHOT).write_bytes(b"damaged")
    snapshots.tick()
    assert plane.services.active.current.version == 50
    plane.services._machine.log.drain()
    assert SNAPSHOT in capfd.readouterr().err


def test_a_snapshot_that_cannot_be_used_leaves_the_last_one(plane: Plane) -> None:
    before = plane.services.active.current
    broken = msgspec.structs.replace(before.snapshot, version=99, gateways=(gateway("one", protocol="gopher"),))
    assert not plane.services.snapshots.take(broken) and plane.services.active.current is before
    plane.services.snapshots.emit_event(99, "Snapshot 99 was given up.")
    assert [event.message for event in EventSpool(plane.data_dir).take()] == ["Snapshot 99 was given up."]


def test_connections_of_an_endpoint_that_is_gone_are_closed(plane: Plane) -> None:
    client = plane.ask()
    plane.answer(plane.engine(0), whole(BODY))
    assert status_of(client) == 200 and not plane.engine(0).is_closed
    plane.take(each={"endpoints": ()})
    assert plane.engine(0).is_closed


# --- ticks ---


def test_the_load_of_others_counts_while_it_is_fresh(plane: Plane) -> None:
    activator = plane.services._activator
    assert isinstance(activator, TableActivator)
    now_ms = int(plane.loop.time() * 1000)
    plane.shared.set_signal(0, EndpointSignal.FOREIGN, 5)
    plane.shared.set_signal(0, EndpointSignal.LOAD_SEEN_MS, now_ms)
    activator.update_deployments(now_ms + LOAD_FRESH_MS - 1)
    assert plane.services.active.current.deployments[0].external_in_flight == 5
    activator.update_deployments(now_ms + LOAD_FRESH_MS)
    assert plane.services.active.current.deployments[0].external_in_flight == 0


def test_a_tick_renews_the_heartbeat_and_once_a_second_closes_idle_upstreams(plane: Plane) -> None:
    plane.ask()
    plane.answer(plane.engine(0), whole(BODY))
    assert isinstance(plane.services.ticker, Ticker) and SECOND_TICKS == 20
    plane.wait(3.0)
    assert not plane.engine(0).is_closed
    assert plane.shared.get(0, WorkerCell.HEARTBEAT_MS) == int(plane.loop.time() * 1000)
    plane.wait(3.0)
    assert plane.engine(0).is_closed


def test_a_loop_that_stood_still_is_told(plane: Plane) -> None:
    plane.services.note_lag(0.3, "somewhere")
    assert plane.shared.get(0, WorkerCell.LAG_MS) == 300 and plane.metric("fleetgate_loop_lags_total") == 1
    assert "300 ms: somewhere" in EventSpool(plane.data_dir).take()[0].message


def test_what_runs_short_is_on_the_board(plane: Plane) -> None:
    held = plane.services.limits.bodies
    assert isinstance(plane.services, DataPlane) and held.hold(held.budget_bytes)
    for _ in range(10):
        plane.services.ticker.tick()
        plane.services.ticker.check_overload()
    assert plane.shared.get(0, WorkerCell.SHORT)
    held.release(held.budget_bytes)


# --- the process ---


def test_a_worker_is_told_everything_in_one_variable(tmp_path: Path) -> None:
    for name in ("seal.key", "pepper", "signing.pub"):
        (tmp_path / name).write_bytes(b"x" * 32)
    fd = os.memfd_create("test")
    os.ftruncate(fd, SharedMemory.bytes_needed(2))
    config = WorkerConfig(index=1, workers=2, data_dir=str(tmp_path), board_fd=fd, listen_fd=-1)
    told = msgspec.json.decode(msgspec.json.encode(config), type=WorkerConfig)
    assert told == config
    process = WorkerProcess(told)
    process.shared.set(1, WorkerCell.PID, 42)
    assert SharedMemory(memoryview(mmap.mmap(fd, SharedMemory.bytes_needed(2))), 2).get(1, WorkerCell.PID) == 42
    os.close(fd)
