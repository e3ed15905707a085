"""The application of the operations port: API, console, health and metrics behind one middleware."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fleetgate.control.api import (
    apply,
    calibrations,
    errors,
    faults,
    live_state,
    ops,
    reload,
    resources,
    usage,
)
from fleetgate.control.api.auth_middleware import AuthMiddleware
from fleetgate.control.calibration.jobs import Calibrations
from fleetgate.control.context import Control
from fleetgate.control.faults import FaultService
from fleetgate.control.resources.schema import KINDS

OPENAPI_PATH = "/api/v1/openapi.json"
_SCHEMAS = "#/components/schemas/{model}"


class ApplyRequest(BaseModel):
    """Documents of any kind, applied as a whole or not at all."""

    documents: list[dict[str, Any]]
    dry_run: bool = False
    confirmed: bool = False  # apply even if it removes many Endpoints


def create_app(control: Control, hosts: list[str], fault_service: FaultService | None = None) -> FastAPI:
    """The ASGI application. Shape: `hosts` are the allowed Host names beside localhost and IP addresses."""
    app = FastAPI(
        title="Fleetgate",
        version="1",
        description="One stable endpoint in front of inference Deployments in any region.",
        openapi_url=OPENAPI_PATH,
        docs_url=None,  # these pages load scripts from other sites
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    errors.install(app)
    for kind in KINDS:
        app.include_router(resources.routes(control, kind))
    app.include_router(calibrations.routes(Calibrations(control)))
    app.include_router(apply.routes(control))
    app.include_router(reload.routes(control))
    app.include_router(faults.routes(control, fault_service or FaultService(control)))
    app.include_router(usage.routes(control))
    app.include_router(live_state.routes(control))
    app.include_router(ops.routes(control))
    app.add_middleware(AuthMiddleware, owner_token=control.data_dir.owner_token, hosts=hosts)
    _add_document_schemas(app)
    return app


def _add_document_schemas(app: FastAPI) -> None:
    """Add the schemas of documents. The routes validate documents themselves, to report every mistake at once."""
    base_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = base_openapi()
            models: list[type[BaseModel]] = [*KINDS.values(), ApplyRequest, errors.ErrorAnswer]
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_SCHEMAS)
            components = described.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            components["securitySchemes"] = {"owner": {"type": "http", "scheme": "bearer"}}
            described["security"] = [{"owner": []}]
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
