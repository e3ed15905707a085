"""The live picture for the console: put together from the board when somebody asks, never kept."""

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter

from fleetgate.control.api import views as shown
from fleetgate.control.api.errors import ErrorAnswer
from fleetgate.control.context import Control
from fleetgate.control.snapshot import profiles
from fleetgate.core.model import Deployment, Gateway, Snapshot
from fleetgate.ipc.exposition import MetricSeries, read_series
from fleetgate.ipc.shared_memory import LEARNED_CELLS, EndpointSignal, LearnedCell, SharedMemory, WorkerCell

REQUESTS = "fleetgate_requests_total"
TTFT = "fleetgate_ttft_seconds"


# Whether an engine goes on with what another had begun.
PREFILL = ("not known", "yes", "no")


def routes(control: Control) -> APIRouter:
    """`/api/v1/state`."""
    router = APIRouter(prefix="/api/v1")

    @router.get("/state", operation_id="get_state", summary="The live picture", responses={401: {"model": ErrorAnswer}})
    def state() -> dict[str, Any]:
        config = control.config
        return {
            "listen": config.listen,
            "tls_listen": config.tls_listen,
            "region": config.region,
            "auth": config.auth,
            **picture(control.publisher.current, control.board),
        }

    return router


def picture(snapshot: Snapshot | None, board: SharedMemory | None) -> dict[str, Any]:
    """Gateways, Deployments and workers as they are now."""
    series = read_series(board.series_totals() if board else {})
    gateways = snapshot.gateways if snapshot else ()
    deployments = snapshot.deployments if snapshot else ()
    return {
        "now": shown.moment(time.time()),
        "snapshot_version": snapshot.version if snapshot else 0,
        "snapshot_made_at": shown.moment(snapshot.made_at_s) if snapshot else None,
        "gateways": [_gateway(gateway, board, series) for gateway in gateways],
        "deployments": [
            {**_deployment(deployment, board, series), **takes(deployment, gateways, board)}
            for deployment in deployments
        ],
        "workers": workers_of(board),
    }


def endpoint_up(board: SharedMemory | None, slot: int) -> bool:
    """Whether an Endpoint counts as up: what was never probed does."""
    return (
        board is None or not board.signal(slot, EndpointSignal.SEEN_MS) or bool(board.signal(slot, EndpointSignal.UP))
    )


def workers_of(board: SharedMemory | None) -> list[dict[str, Any]]:
    """The workers as they report themselves."""
    return [
        {
            "worker": worker,
            "pid": board.get(worker, WorkerCell.PID),
            "accepting": bool(board.get(worker, WorkerCell.ACCEPTING)),
            "connections": board.get(worker, WorkerCell.CONNECTIONS),
            "snapshot_version": board.get(worker, WorkerCell.SNAPSHOT_VERSION),
            "starts": board.get(worker, WorkerCell.STARTS),
        }
        for worker in (board.present() if board else ())
        if board
    ]


def _gateway(gateway: Gateway, board: SharedMemory | None, series: MetricSeries) -> dict[str, Any]:
    return {
        "name": gateway.name,
        "host": gateway.host,
        "protocol": gateway.protocol,
        "strategy": gateway.strategy,
        "default": gateway.default,
        "waiting": board.waiting_total(gateway.slot) if board else 0,
        "queue_max": gateway.admission.queue_max,
        "upstreams": [{"deployment": upstream.deployment, "rank": upstream.rank} for upstream in gateway.upstreams],
        "requests": series.counts_by(REQUESTS, "outcome", gateway=gateway.name),
        **_ttft(series, gateway=gateway.name),
    }


def _deployment(deployment: Deployment, board: SharedMemory | None, series: MetricSeries) -> dict[str, Any]:
    endpoints: list[dict[str, Any]] = [
        {
            "url": f"{endpoint.origin}{endpoint.base_path}",
            "up": endpoint_up(board, endpoint.slot),
            "probed": bool(board and board.signal(endpoint.slot, EndpointSignal.SEEN_MS)),
            "prefill": PREFILL[board.signal(endpoint.slot, EndpointSignal.PREFILL)] if board else PREFILL[0],
            "running": board.signal(endpoint.slot, EndpointSignal.RUNNING) if board else 0,
            "waiting": board.signal(endpoint.slot, EndpointSignal.WAITING) if board else 0,
            "kv_ratio": board.signal(endpoint.slot, EndpointSignal.KV_PERMILLE) / 1000 if board else 0.0,
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
        "in_flight": board.in_flight_total(deployment.slot) if board else 0,
        "waiting": sum(endpoint["waiting"] for endpoint in endpoints),
        "requests": series.counts_by(REQUESTS, "outcome", deployment=deployment.name),
        **_ttft(series, deployment=deployment.name),
    }


def takes(deployment: Deployment, gateways: Iterable[Gateway], board: SharedMemory | None) -> dict[str, Any]:
    """What a Deployment takes: `units` and `limit` in short, `capacity` with the token form and the source."""
    learned_limit = board.learned[deployment.slot * LEARNED_CELLS + LearnedCell.LIMIT] if board else 0
    capacity = profiles.profile_description(
        deployment, profiles.strictest_tpot_s(gateways, deployment.name), learned_limit
    )
    return {"limit": capacity["limit"] or 0, "units": capacity["units"] or 0.0, "capacity": capacity}


def _ttft(series: MetricSeries, **labels: str) -> dict[str, float | None]:
    histogram = series.histogram(TTFT, **labels)
    return {"ttft_p50_s": histogram.quantile_s(0.5), "ttft_p99_s": histogram.quantile_s(0.99)}
