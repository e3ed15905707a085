"""`/metrics` of the control process: everything in shared memory, read when it is scraped."""

import time
from collections.abc import Iterator

from fleetgate.control.context import Control
from fleetgate.control.snapshot.endpoint_status import endpoint_up
from fleetgate.control.telemetry.log import LOG
from fleetgate.control.telemetry.overload_metrics import journal_metrics, shortage_metrics
from fleetgate.core.admission.work_ledger import WorkCell
from fleetgate.core.model import Deployment, Snapshot
from fleetgate.core.usage_record import JOURNAL
from fleetgate.ipc.exposition import Family, exposition_text, read_series, series_families
from fleetgate.ipc.machine_status import running_workers
from fleetgate.ipc.shared_memory import EndpointSignal, SharedMemory, WorkerCell


def exposition(control: Control, openmetrics: bool) -> str:
    """The text of `/metrics`."""
    return exposition_text(families(control), openmetrics)


def families(control: Control) -> Iterator[Family]:
    """Every metric."""
    shared_memory, snapshot = control.shared_memory, control.publisher.current
    if shared_memory is not None:
        totals = shared_memory.series_totals()
        if LOG.dropped:
            totals['fleetgate_log_lines_dropped_total{log="control"}'] = LOG.dropped
        yield from series_families(read_series(totals))
        yield from _worker_metrics(shared_memory)
        yield shortage_metrics(shared_memory)
        yield from journal_metrics(shared_memory, control.data_dir.path / JOURNAL)
    if snapshot is not None:
        yield Family("fleetgate_snapshot_age_seconds").add((), max(0.0, time.time() - snapshot.made_at_s))
    if shared_memory is not None and snapshot is not None:
        queue = Family("fleetgate_queue")
        for gateway in snapshot.gateways:
            queue.add((gateway.name,), shared_memory.waiting_total(gateway.slot))
        yield queue
        yield from _deployment_metrics(shared_memory, snapshot)
        yield from _endpoint_metrics(shared_memory, snapshot)


def _worker_metrics(shared_memory: SharedMemory) -> Iterator[Family]:
    running = running_workers(shared_memory)
    starts = [shared_memory.get(worker, WorkerCell.STARTS) for worker in range(shared_memory.workers)]
    yield Family("fleetgate_workers").add((), len(running))
    yield Family("fleetgate_worker_restarts_total").add((), sum(max(0, count - 1) for count in starts))
    connections, version = Family("fleetgate_connections"), Family("fleetgate_snapshot_version")
    for worker in running:
        connections.add((str(worker),), shared_memory.get(worker, WorkerCell.CONNECTIONS))
        version.add((str(worker),), shared_memory.get(worker, WorkerCell.SNAPSHOT_VERSION))
    yield connections
    yield version


def _deployment_metrics(shared_memory: SharedMemory, snapshot: Snapshot) -> Iterator[Family]:
    """Load and capacity of Deployments: learned if known, else configured."""
    in_flight, limit = Family("fleetgate_in_flight"), Family("fleetgate_limit")
    units, margin, held = (
        Family(name) for name in ("fleetgate_units", "fleetgate_margin", "fleetgate_units_in_flight")
    )
    for deployment in snapshot.deployments:
        labels = deployment.name, deployment.region
        in_flight.add(labels, shared_memory.in_flight_total(deployment.slot))
        learned = shared_memory.learned_limits(deployment.slot)
        limit_now = learned.limit if learned is not None else deployment.concurrency_max
        if limit_now:
            limit.add(labels, limit_now)
        if learned is not None:
            units.add(labels, learned.milliunits / 1000)
        if deployment.profile is not None:
            held.add(labels, shared_memory.milliunits_total(deployment.slot) / 1000)
            if learned is not None:
                margin.add(labels, learned.margin_permille / 1000)
    yield from (in_flight, limit, units, margin, held)


_ENDPOINT_METRICS = (
    "fleetgate_endpoint_up",
    "fleetgate_endpoint_prefill",
    "fleetgate_engine_running",
    "fleetgate_engine_waiting",
    "fleetgate_engine_kv_ratio",
    "fleetgate_work_tokens",
)


def _endpoint_metrics(shared_memory: SharedMemory, snapshot: Snapshot) -> Iterator[Family]:
    made = {name: Family(name) for name in _ENDPOINT_METRICS}
    for deployment in snapshot.deployments:
        _add_endpoints(made, shared_memory, deployment)
    yield from made.values()


def _add_endpoints(made: dict[str, Family], shared_memory: SharedMemory, deployment: Deployment) -> None:
    for endpoint in deployment.endpoints:
        labels = deployment.name, f"{endpoint.origin}{endpoint.base_path}"
        slot, signal = endpoint.slot, shared_memory.signal
        made["fleetgate_endpoint_up"].add(labels, int(endpoint_up(shared_memory, slot)))
        made["fleetgate_endpoint_prefill"].add(labels, signal(slot, EndpointSignal.PREFILL))
        if signal(slot, EndpointSignal.LOAD_SEEN_MS):
            made["fleetgate_engine_running"].add(labels, signal(slot, EndpointSignal.RUNNING))
            made["fleetgate_engine_waiting"].add(labels, signal(slot, EndpointSignal.WAITING))
            made["fleetgate_engine_kv_ratio"].add(labels, signal(slot, EndpointSignal.KV_PERMILLE) / 1000)
        work = made["fleetgate_work_tokens"]
        work.add((*labels, "pending"), shared_memory.work_total(slot, WorkCell.PENDING_TOKENS))
        work.add((*labels, "kv"), shared_memory.work_total(slot, WorkCell.KV_TOKENS))
