"""What the routes ask for: the service, the loaded host, and how a body is documented."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Request
from pydantic import BaseModel

from server.host import Host, Service
from server.schema.errors import ErrorEnvelope
from server.translate import Call


def service_of(request: Request) -> Service:
    """The application's service."""
    service: Service = request.app.state.service
    return service


def ready_host(request: Request) -> Host:
    """The loaded host. Raises ApiError 503 while loading or draining."""
    return service_of(request).ready_host()


ServiceDep = Annotated[Service, Depends(service_of)]
HostDep = Annotated[Host, Depends(ready_host)]

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorEnvelope, "description": "One sentence that names the field and says what to do"},
    "503": {"model": ErrorEnvelope, "description": "Loading or shutting down"},
}
"""Responses that every route may give."""


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of a JSON body that a dependency reads."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def note(request: Request, call: Call) -> None:
    """Leave for the log line what a generating request was."""
    request.state.notes = {
        "id": call.id,
        "choices": len(call.requests),
        "prompt_tokens": sum(len(call.requests[index].prompt) for index in call.prompts),
        "steered": call.steered,
    }
