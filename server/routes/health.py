"""`/health/live`, `/health/ready`, `/health`, `/version`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.routes.common import ServiceDep
from steering import __version__

router = APIRouter(tags=["Operation"])


@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 while the process answers at all."""
    return {"status": "live"}


@router.get("/health/ready")
@router.get("/health", include_in_schema=False)
async def ready(service: ServiceDep) -> JSONResponse:
    """200 when requests are served, 503 while loading and while draining."""
    is_ready = service.state == "ready"
    headers = {} if is_ready else {"Retry-After": "1"}
    return JSONResponse({"status": service.state}, 200 if is_ready else 503, headers)


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": __version__}
