"""Clusters, Deployments, Gateways, Keys and Secrets over REST: the same five routes each."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from fleetgate.control.api import views as shown
from fleetgate.control.api.errors import ApiError, ErrorAnswer
from fleetgate.control.api.live_state import capacity_fields
from fleetgate.control.api.request_bodies import if_match, read_document
from fleetgate.control.context import Control, has_changes
from fleetgate.control.resources.apply import API, ApplyResult
from fleetgate.control.store import repository as rows

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 409, 413, 421, 422, 503)
}


Confirmed = Annotated[bool, Query(description="Do it although it takes many Endpoints away.")]


def routes(control: Control, kind: str) -> APIRouter:
    """The routes of one kind."""
    plural = f"{kind.lower()}s"
    router = APIRouter(prefix=f"/api/v1/{plural}", tags=[plural], responses=ERRORS)
    body = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}},
        }
    }

    @router.get("", operation_id=f"list_{plural}", summary=f"All {plural}")
    def list_all() -> dict[str, Any]:
        with control.database.read() as connection:
            world, keys = rows.load_resources(connection), rows.load_keys(connection)
        found = [stored for stored in world.values() if stored.kind == kind]
        return {"items": [shown.resource_view(stored, keys.get(stored.name)) for stored in found]}

    @router.post("", status_code=201, operation_id=f"create_{kind.lower()}", summary="Create", openapi_extra=body)
    async def create(request: Request) -> JSONResponse:
        document = await read_document(request, kind, None)
        return await write_document(control, {**document, "generation": 0})

    @router.get("/{name}", operation_id=f"get_{kind.lower()}", summary="One")
    def get(name: str) -> JSONResponse:
        return _one(control, kind, name)

    @router.put(
        "/{name}",
        operation_id=f"put_{kind.lower()}",
        summary="Create or replace; `generation` or If-Match makes it compare and swap",
        responses={201: {"description": "Created"}},
        openapi_extra=body,
    )
    async def put(name: str, request: Request, confirmed: Confirmed = False) -> JSONResponse:
        document = await read_document(request, kind, name)
        generation = if_match(request)
        if generation is not None:
            document["generation"] = generation
        return await write_document(control, document, confirmed)

    @router.delete("/{name}", operation_id=f"delete_{kind.lower()}", summary="Delete, unless something uses it")
    async def delete(name: str, request: Request, confirmed: Confirmed = False) -> dict[str, Any]:
        deleted = await asyncio.to_thread(control.changes.delete, kind, name, if_match(request), confirmed)
        if deleted is None:
            raise _absent(kind, name)
        await control.adopted(kind == "Key")
        return result_fields(deleted)

    return router


async def write_document(control: Control, document: dict[str, Any], confirmed: bool = False) -> JSONResponse:
    """Write one document and answer with it; a new Key's text is beside it, this once."""
    checked = await control.changes.check([document], API)
    results = await asyncio.to_thread(control.changes.apply, checked, API, False, confirmed)
    if has_changes(results):
        await control.adopted(results[0].kind == "Key")
    result = results[0]
    status = 201 if result.outcome == "created" else 200
    return await asyncio.to_thread(_one, control, result.kind, result.name, status, result.key)


def result_fields(result: ApplyResult) -> dict[str, Any]:
    """What became of a document."""
    told = {"kind": result.kind, "name": result.name, "outcome": result.outcome, "generation": result.generation}
    return {**told, "key": result.key} if result.key else told


def _one(control: Control, kind: str, name: str, status: int = 200, key: str = "") -> JSONResponse:
    with control.database.read() as connection:
        stored = rows.load_resource(connection, kind, name)
        kept = rows.load_keys(connection).get(name) if kind == "Key" else None
    if stored is None:
        raise _absent(kind, name)
    body = shown.resource_view(stored, kept)
    if key:
        body["key"] = key
    if kind == "Deployment":
        body |= _status(control, name)
    return JSONResponse(body, status, {"etag": f'"{stored.generation}"'})


def _status(control: Control, name: str) -> dict[str, Any]:
    """How a Deployment stands in the last Snapshot; nothing while it is not in it yet."""
    snapshot = control.publisher.current
    found = next((one for one in snapshot.deployments if one.name == name), None) if snapshot else None
    if snapshot is None or found is None:
        return {}
    return {"status": {"capacity": capacity_fields(found, snapshot.gateways, control.board)["capacity"]}}


def _absent(kind: str, name: str) -> ApiError:
    return ApiError(404, f"there is no {kind} {name[:63]!r}; list them with GET /api/v1/{kind.lower()}s")
