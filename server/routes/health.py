"""`/health/live`, `/health/ready`, `/health`, `/version`. The health checks need no key, and take HEAD and OPTIONS."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from server.routes.common import ServiceDep
from steering import __version__

router = APIRouter(tags=["Operation"])


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 while the process answers at all."""
    return {"status": "live"}


@router.head("/health/ready", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.get("/health/ready")
@router.get("/health", include_in_schema=False)
async def ready(service: ServiceDep) -> JSONResponse:
    """200 when requests are served, 503 while loading and while draining."""
    is_ready = service.state == "ready"
    headers = {} if is_ready else {"Retry-After": "1"}
    return JSONResponse({"status": service.state}, 200 if is_ready else 503, headers)


@router.options("/health/live", include_in_schema=False)
@router.options("/health/ready", include_in_schema=False)
@router.options("/health", include_in_schema=False)
async def methods() -> Response:
    """What the health checks take."""
    return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS"})


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": __version__}
