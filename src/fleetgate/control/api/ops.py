"""What needs no token: the console's files, liveness, readiness and metrics."""

import asyncio
import time
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from fleetgate.control.context import Control
from fleetgate.control.telemetry.metrics import exposition
from fleetgate.control.telemetry.readiness import degradations, reasons_against

_STATIC = Path(__file__).parent.parent / "static"
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def routes(control: Control) -> APIRouter:
    """The operations side."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(_STATIC.iterdir()):
        if file.suffix in _MEDIA_TYPES:
            _serve(router, file)

    @router.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @router.api_route("/readyz", methods=["GET", "HEAD"])
    async def readyz() -> JSONResponse:
        board, publisher, now_s = control.shared_memory, control.publisher, time.monotonic()
        serving = control.config.serving or control.config.workers
        reasons = reasons_against(board, serving, publisher.current, control.started, now_s)
        return JSONResponse(
            {"ready": not reasons, "reasons": reasons, **degradations(board, publisher.refusal, now_s, time.time())},
            503 if reasons else 200,
        )

    @router.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(exposition, control), media_type=CONTENT_TYPE_LATEST)

    return router


def _serve(router: APIRouter, file: Path) -> None:
    """One file at one fixed path, read once: no path from a client ever reaches the disk."""
    content = file.read_bytes()
    media_type = _MEDIA_TYPES[file.suffix]

    async def answer() -> Response:
        return Response(content, media_type=media_type)

    path = "/" if file.name == "index.html" else f"/{file.name}"
    router.add_api_route(path, answer, methods=["GET", "HEAD"], name=file.name)
