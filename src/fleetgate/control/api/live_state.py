"""The live state for the console, read from shared memory at each request."""

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter

from fleetgate.control.api import views
from fleetgate.control.api.errors import ErrorAnswer
from fleetgate.control.context import Control
from fleetgate.control.snapshot import profiles
from fleetgate.control.snapshot.endpoint_status import endpoint_up
from fleetgate.core.model import Deployment, Gateway, Snapshot
from fleetgate.ipc.exposition import MetricSeries, read_series
from fleetgate.ipc.shared_memory import LEARNED_CELLS, EndpointSignal, LearnedCell, SharedMemory, WorkerCell

REQUESTS = "fleetgate_requests_total"
TTFT = "fleetgate_ttft_seconds"
PREFILL = ("not known", "yes", "no")  # whether an engine continues a response that another engine began


def routes(control: Control) -> APIRouter:
    """`/api/v1/state`."""
    router = APIRouter(prefix="/api/v1")

    @router.get("/state", operation_id="get_state", summary="The live state", responses={401: {"model": ErrorAnswer}})
    def state() -> dict[str, Any]:
        config = control.config
        return {
            "listen": config.listen,
            "tls_listen": config.tls_listen,
            "region": config.region,
            "auth": config.auth,
            **fleet_state(control.publisher.current, control.shared_memory),
        }

    return router


def fleet_state(snapshot: Snapshot | None, shared_memory: SharedMemory | None) -> dict[str, Any]:
    """The current state of Gateways, Deployments and workers."""
    series = read_series(shared_memory.series_totals() if shared_memory else {})
    gateways = snapshot.gateways if snapshot else ()
    deployments = snapshot.deployments if snapshot else ()
    return {
        "now": views.rfc3339(time.time()),
        "snapshot_version": snapshot.version if snapshot else 0,
        "snapshot_made_at": views.rfc3339(snapshot.made_at_s) if snapshot else None,
        "gateways": [_gateway(gateway, shared_memory, series) for gateway in gateways],
        "deployments": [
            {**_deployment(deployment, shared_memory, series), **capacity_fields(deployment, gateways, shared_memory)}
            for deployment in deployments
        ],
        "workers": worker_states(shared_memory),
    }


def worker_states(shared_memory: SharedMemory | None) -> list[dict[str, Any]]:
    """The state that each worker reports."""
    return [
        {
            "worker": worker,
            "pid": shared_memory.get(worker, WorkerCell.PID),
            "accepting": bool(shared_memory.get(worker, WorkerCell.ACCEPTING)),
            "connections": shared_memory.get(worker, WorkerCell.CONNECTIONS),
            "snapshot_version": shared_memory.get(worker, WorkerCell.SNAPSHOT_VERSION),
            "starts": shared_memory.get(worker, WorkerCell.STARTS),
        }
        for worker in (shared_memory.present() if shared_memory else ())
        if shared_memory
    ]


def _gateway(gateway: Gateway, shared_memory: SharedMemory | None, series: MetricSeries) -> dict[str, Any]:
    return {
        "name": gateway.name,
        "host": gateway.host,
        "protocol": gateway.protocol,
        "strategy": gateway.strategy,
        "default": gateway.default,
        "waiting": shared_memory.waiting_total(gateway.slot) if shared_memory else 0,
        "queue_max": gateway.admission.queue_max,
        "upstreams": [{"deployment": upstream.deployment, "rank": upstream.rank} for upstream in gateway.upstreams],
        "requests": series.counts_by(REQUESTS, "outcome", gateway=gateway.name),
        **_ttft(series, gateway=gateway.name),
    }


def _deployment(deployment: Deployment, shared_memory: SharedMemory | None, series: MetricSeries) -> dict[str, Any]:
    endpoints: list[dict[str, Any]] = [
        {
            "url": f"{endpoint.origin}{endpoint.base_path}",
            "up": endpoint_up(shared_memory, endpoint.slot),
            "probed": bool(shared_memory and shared_memory.signal(endpoint.slot, EndpointSignal.SEEN_MS)),
            "prefill": PREFILL[shared_memory.signal(endpoint.slot, EndpointSignal.PREFILL)]
            if shared_memory
            else PREFILL[0],
            "running": shared_memory.signal(endpoint.slot, EndpointSignal.RUNNING) if shared_memory else 0,
            "waiting": shared_memory.signal(endpoint.slot, EndpointSignal.WAITING) if shared_memory else 0,
            "kv_ratio": shared_memory.signal(endpoint.slot, EndpointSignal.KV_PERMILLE) / 1000
            if shared_memory
            else 0.0,
        }
        for endpoint in deployment.endpoints
    ]
    return {
        "name": deployment.name,
        "region": deployment.region,
        "engine": deployment.engine,
        "tier": deployment.tier,
        "models": sorted(deployment.models),
        "up": any(endpoint["up"] for endpoint in endpoints),
        "endpoints": endpoints,
        "in_flight": shared_memory.in_flight_total(deployment.slot) if shared_memory else 0,
        "waiting": sum(endpoint["waiting"] for endpoint in endpoints),
        "requests": series.counts_by(REQUESTS, "outcome", deployment=deployment.name),
        **_ttft(series, deployment=deployment.name),
    }


def capacity_fields(
    deployment: Deployment, gateways: Iterable[Gateway], shared_memory: SharedMemory | None
) -> dict[str, Any]:
    """The capacity of a Deployment: `units` and `limit` as figures, `capacity` with the token form and the source."""
    learned_limit = shared_memory.learned[deployment.slot * LEARNED_CELLS + LearnedCell.LIMIT] if shared_memory else 0
    capacity = profiles.profile_description(
        deployment, profiles.strictest_tpot_s(gateways, deployment.name), learned_limit
    )
    return {"limit": capacity["limit"] or 0, "units": capacity["units"] or 0.0, "capacity": capacity}


def _ttft(series: MetricSeries, **labels: str) -> dict[str, float | None]:
    histogram = series.histogram(TTFT, **labels)
    return {"ttft_p50_s": histogram.quantile_s(0.5), "ttft_p99_s": histogram.quantile_s(0.99)}
