"""Sets of documents, applied as a whole or not at all; and the Events."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from fleetgate.control.api import views
from fleetgate.control.api.errors import ApiError
from fleetgate.control.api.request_bodies import read_json
from fleetgate.control.api.resources import ERRORS, result_fields
from fleetgate.control.context import Control, has_changes
from fleetgate.control.resources.apply import API
from fleetgate.control.store import repository as rows

EVENTS_MAX = 1_000


def routes(control: Control) -> APIRouter:
    """`/api/v1/apply` and `/api/v1/events`."""
    router = APIRouter(prefix="/api/v1", responses=ERRORS)
    body = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ApplyRequest"}}},
        }
    }

    @router.post("/apply", operation_id="apply", summary="Apply documents, all or none", openapi_extra=body)
    async def apply(request: Request) -> dict[str, Any]:
        documents, dry_run, confirmed = _parse_body(await read_json(request))
        checked = await control.writer.check(documents, API)
        results = await asyncio.to_thread(control.writer.apply, checked, API, dry_run, confirmed)
        if has_changes(results) and not dry_run:
            await control.wait_adopted(all(result.kind == "Key" for result in results))
        return {"dry_run": dry_run, "results": [result_fields(result) for result in results]}

    @router.get("/events", operation_id="list_events", summary="Events, oldest first")
    def events(
        limit: Annotated[int, Query(ge=1, le=EVENTS_MAX)] = 100,
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        kind: Annotated[str, Query(max_length=32)] = "",
        name: Annotated[str, Query(max_length=63)] = "",
    ) -> dict[str, Any]:
        of = (kind, name) if kind and name else None
        with control.database.read() as connection:
            found = rows.load_events(connection, after, limit, of)
        return {"items": [views.event_view(event) for event in found]}

    return router


def _parse_body(value: Any) -> tuple[list[Any], bool, bool]:
    match value:
        case {"documents": list() as documents, **rest}:
            dry_run, confirmed = _flag(rest, "dry_run"), _flag(rest, "confirmed")
            if rest:
                known = "`documents`, `dry_run` and `confirmed`"
                raise ApiError(422, f"{next(iter(rest))!r:.60} is not a known field; send {known}")
            return documents, dry_run, confirmed
        case _:
            raise ApiError(422, 'the body has no list of documents; send {"documents": [...], "dry_run": false}')


def _flag(fields: dict[Any, Any], name: str) -> bool:
    match fields.pop(name, False):
        case bool() as flag:
            return flag
        case _:
            raise ApiError(422, f"{name} is not true or false; correct it or omit it")
