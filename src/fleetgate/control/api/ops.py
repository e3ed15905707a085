"""The paths that need no token: the console's files, liveness, readiness and metrics."""

import asyncio
import time
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from fleetgate.control.context import Control
from fleetgate.control.telemetry.metrics import exposition
from fleetgate.control.telemetry.readiness import degradations, reasons_against
from fleetgate.ipc.exposition import OPENMETRICS_TYPE, TEXT_TYPE, wants_openmetrics

_STATIC = Path(__file__).parent.parent / "static"
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def routes(control: Control) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(_STATIC.iterdir()):
        if file.suffix in _MEDIA_TYPES:
            _serve(router, file)

    @router.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @router.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> JSONResponse:
        shared_memory, publisher, now_s = control.shared_memory, control.publisher, time.monotonic()
        serving = control.config.serving or control.config.workers
        reasons = reasons_against(shared_memory, serving, publisher.current, control.started, now_s)
        return JSONResponse(
            {
                "ready": not reasons,
                "reasons": reasons,
                **degradations(shared_memory, publisher.refusal, now_s, time.time()),
            },
            503 if reasons else 200,
        )

    @router.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics(request: Request) -> Response:
        openmetrics = wants_openmetrics(request.headers.get("accept", ""))
        text = await asyncio.to_thread(exposition, control, openmetrics)
        return Response(text, headers={"content-type": OPENMETRICS_TYPE if openmetrics else TEXT_TYPE})

    return router


def _serve(router: APIRouter, file: Path) -> None:
    """Serve one file, read once, at a fixed path; no path from a client reaches the disk."""
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[file.suffix]

    async def respond() -> Response:
        return Response(content, media_type=media_type)

    path = "/" if file.name == "index.html" else f"/{file.name}"
    router.add_api_route(path, respond, methods=["GET", "HEAD"], name=file.name)
