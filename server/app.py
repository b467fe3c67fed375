"""The application: routes, what wraps them, and how anything that goes wrong is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from server.access import Access
from server.host import Host, Service
from server.middleware import Gate
from server.routes import (
    artifacts,
    capture,
    chat,
    completions,
    generate,
    health,
    jobs,
    metrics,
    models,
    presets,
    steering,
)
from server.schema.capture import CaptureRequest
from server.schema.errors import ApiError, from_steering
from server.schema.jobs import FitRequest, SweepRequest
from server.schema.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
    TraceRequest,
)
from server.schema.steering import SteeringSpec
from server.settings import ServerSettings
from steering import SteeringError, __version__

BODIES = (
    CaptureRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    SteeringSpec,
    TokenizeRequest,
    TraceRequest,
    FitRequest,
    SweepRequest,
)
PARTS = (chat, completions, generate, models, steering, artifacts, presets, capture, health, metrics, jobs)
_REFS = "#/components/schemas/{model}"


def create_app(
    settings: ServerSettings | None = None,
    host: Host | None = None,
    *,
    service: Service | None = None,
    loads: bool = True,
) -> FastAPI:
    """The application. Without `host` the model of `settings` is loaded before the first request; with `loads=False`
    the caller loads the service, its own where it gives one, and requests get a 503 until then.

    `uvicorn --factory server:create_app` works too: the settings then come from `SETPOINT_…` variables.
    """
    settings = settings or ServerSettings.from_env()
    app = FastAPI(
        title="Setpoint", version=__version__, lifespan=_lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.settings = settings
    app.state.service = service or Service(settings, host)
    app.state.loads = loads
    for part in PARTS:
        app.include_router(part.router)
    access = Access(settings.api_key, settings.admin_key, settings.is_local_only)
    told = app.state.service.metrics.answered
    app.add_middleware(Gate, access=access, answered=told, body_seconds=settings.body_seconds)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(SteeringError, _steering_error)
    app.add_exception_handler(HTTPException, _http_error)
    document = app.openapi
    app.openapi = lambda: _openapi(app, document())  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load before the first request, stop the engine after the last."""
    service: Service = app.state.service
    if app.state.loads:
        await service.load()
    yield
    await service.close()


def _render(request: Request, error: ApiError) -> JSONResponse:
    request.state.error = error.code
    request.app.state.service.metrics.refused(error.code)
    return JSONResponse(error.body(), error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _render(request, error)


async def _steering_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SteeringError)
    return _render(request, from_steering(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message, code = "There is nothing at this address; /openapi.json lists what there is.", "not_found"
    elif error.status_code == 405:
        message, code = f"This address does not take {request.method[:20]}.", "method_not_allowed"
    else:
        message, code = str(error.detail), "http_error"
    return _render(request, ApiError(error.status_code, message, code=code, headers=error.headers))


def _openapi(app: FastAPI, document: dict[str, Any]) -> dict[str, Any]:
    """The document with the schemas of the bodies, which are read by dependencies."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    if BODIES[0].__name__ not in schemas:
        _, found = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REFS)
        schemas.update(found["$defs"])
        document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document
