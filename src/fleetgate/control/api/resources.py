"""Clusters, Deployments, Gateways, Keys, Profiles and Secrets over REST, each with the same five routes."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from fleetgate.control.api import views
from fleetgate.control.api.errors import ApiError, ErrorAnswer
from fleetgate.control.api.live_state import capacity_fields
from fleetgate.control.api.request_bodies import if_match, read_document
from fleetgate.control.context import Control, has_changes
from fleetgate.control.resources.apply import API, ApplyResult
from fleetgate.control.store import repository as rows

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 409, 413, 421, 422, 503)
}
Confirmed = Annotated[bool, Query(description="Apply even if it removes many Endpoints.")]


def routes(control: Control, kind: str) -> APIRouter:
    """The routes of one kind of resource."""
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
            resources, keys = rows.load_resources(connection), rows.load_keys(connection)
        found = [stored for stored in resources.values() if stored.kind == kind]
        return {"items": [views.resource_view(stored, keys.get(stored.name)) for stored in found]}

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
        summary="Create or replace; with `generation` or If-Match only if the stored generation matches",
        responses={201: {"description": "Created"}},
        openapi_extra=body,
    )
    async def put(name: str, request: Request, confirmed: Confirmed = False) -> JSONResponse:
        document = await read_document(request, kind, name)
        generation = if_match(request)
        if generation is not None:
            document["generation"] = generation
        return await write_document(control, document, confirmed)

    @router.delete("/{name}", operation_id=f"delete_{kind.lower()}", summary="Delete, unless another resource uses it")
    async def delete(name: str, request: Request, confirmed: Confirmed = False) -> dict[str, Any]:
        deleted = await asyncio.to_thread(control.writer.delete, kind, name, if_match(request), confirmed)
        if deleted is None:
            raise _not_found(kind, name)
        await control.wait_adopted(kind == "Key")
        return result_fields(deleted)

    return router


async def write_document(control: Control, document: dict[str, Any], confirmed: bool = False) -> JSONResponse:
    """Write one document and return it, with the token of a new Key."""
    checked = await control.writer.check([document], API)
    results = await asyncio.to_thread(control.writer.apply, checked, API, False, confirmed)
    if has_changes(results):
        await control.wait_adopted(results[0].kind == "Key")
    result = results[0]
    status = 201 if result.outcome == "created" else 200
    return await asyncio.to_thread(_one, control, result.kind, result.name, status, result.key)


def result_fields(result: ApplyResult) -> dict[str, Any]:
    """The result of a document as the API returns it."""
    fields = {"kind": result.kind, "name": result.name, "outcome": result.outcome, "generation": result.generation}
    return {**fields, "key": result.key} if result.key else fields


def _one(control: Control, kind: str, name: str, status: int = 200, key: str = "") -> JSONResponse:
    with control.database.read() as connection:
        stored = rows.load_resource(connection, kind, name)
        stored_key = rows.load_keys(connection).get(name) if kind == "Key" else None
    if stored is None:
        raise _not_found(kind, name)
    body = views.resource_view(stored, stored_key)
    if key:
        body["key"] = key
    if kind == "Deployment":
        body |= _status(control, name)
    return JSONResponse(body, status, {"etag": f'"{stored.generation}"'})


def _status(control: Control, name: str) -> dict[str, Any]:
    """The status of a Deployment in the last Snapshot; empty while the Snapshot does not have it yet."""
    snapshot = control.publisher.current
    found = next((one for one in snapshot.deployments if one.name == name), None) if snapshot else None
    if snapshot is None or found is None:
        return {}
    return {"status": {"capacity": capacity_fields(found, snapshot.gateways, control.shared_memory)["capacity"]}}


def _not_found(kind: str, name: str) -> ApiError:
    return ApiError(404, f"there is no {kind} {name[:63]!r}; list them with GET /api/v1/{kind.lower()}s")
