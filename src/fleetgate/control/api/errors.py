"""Error responses: always JSON of one shape, never a traceback."""

from collections.abc import Iterable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fleetgate.control.data_dir import DataDirUnusable
from fleetgate.control.resources.apply import GenerationConflict
from fleetgate.control.resources.problems import Problem, ResourceRefused, path_of
from fleetgate.control.resources.removal_guard import ConfirmationRequired

log = structlog.get_logger()


class ErrorItem(BaseModel):
    """One mistake: its path, its message and its fix. Shape: `document` is its index in the given list."""

    path: str
    message: str
    fix: str
    document: int = 0


class ErrorBody(BaseModel):
    """An error.

    Shape: `generation` is the stored one if another was given. `needs_confirmation` means that the change is valid but
    removes many Endpoints; the same request with `confirmed` applies it.
    """

    message: str
    errors: list[ErrorItem] = []
    generation: int | None = None
    needs_confirmation: bool | None = None


class ErrorAnswer(BaseModel):
    """The body of every response with a status of 400 or above."""

    error: ErrorBody


class ApiError(Exception):
    """A request was refused with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_response(
    status: int, message: str, problems: Iterable[Problem] = (), generation: int | None = None
) -> JSONResponse:
    """An error response."""
    body: dict[str, Any] = {
        "message": message,
        "errors": [{"path": p.path, "message": p.message, "fix": p.fix, "document": p.document} for p in problems],
    }
    if generation is not None:
        body["generation"] = generation
    headers = {"www-authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": body}, status, headers)


def install(app: FastAPI) -> None:
    """Register the error response of each exception."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, str(error))

    @app.exception_handler(ResourceRefused)
    async def _refused(_: Request, error: ResourceRefused) -> JSONResponse:
        return error_response(409 if error.conflict else 422, error.message, error.problems)

    @app.exception_handler(GenerationConflict)
    async def _stale(_: Request, error: GenerationConflict) -> JSONResponse:
        return error_response(409, str(error), generation=error.current)

    @app.exception_handler(ConfirmationRequired)
    async def _unconfirmed(_: Request, error: ConfirmationRequired) -> JSONResponse:
        body = {"message": f"nothing was changed: {error}", "errors": [], "needs_confirmation": True}
        return JSONResponse({"error": body}, 409)

    @app.exception_handler(DataDirUnusable)
    async def _unusable(_: Request, error: DataDirUnusable) -> JSONResponse:
        log.error("store_unusable", reason=str(error))
        return error_response(503, f"nothing was changed: {error}")

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            Problem(path_of(item["loc"]), str(item["msg"]).lower(), "correct it, see /api/v1/openapi.json")
            for item in error.errors()
        ]
        return error_response(422, "the request has mistakes", problems)

    @app.exception_handler(Exception)
    async def _bug(_: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", exc_info=error)
        return error_response(500, "internal error; search the log of the control process for `request_failed`")
