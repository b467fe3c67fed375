"""What the routes ask for: the service, the loaded host, and how a body is documented."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from server.account import Json
from server.generation import Generation
from server.host import Host, Service
from server.schema.errors import ApiError, ErrorEnvelope
from server.schema.openai import ChatRequest, CompletionRequest, GenerateRequest
from server.stream import EventStream
from server.tokens import TokenTable
from server.translate import Call
from steering import Finished

B = TypeVar("B", ChatRequest, CompletionRequest, GenerateRequest)


async def service_of(request: Request) -> Service:
    """The application's service. A coroutine, for FastAPI would call a function on a thread: where all of them are
    taken not even the health checks would be answered."""
    service: Service = request.app.state.service
    return service


async def ready_host(service: Annotated[Service, Depends(service_of)]) -> Host:
    """The loaded host. Raises ApiError 503 while loading or draining."""
    return service.ready_host()


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


async def require_model(host: Host, name: str | None) -> None:
    """`Host.require_model`, on a thread where it looks for a preset: the store's place may be slow to answer."""
    if host.preset_of(name) is None:
        host.require_model(name)
    else:
        await run_in_threadpool(host.require_model, name)


async def answered(
    http: Request,
    service: Service,
    host: Host,
    body: B,
    translate: Callable[[B, Host], Call],
    whole: Callable[[Call, Sequence[Finished], TokenTable], Json],
    chunks: Callable[[Call, Generation, TokenTable], AsyncIterator[Json]],
) -> Response:
    """What every generating route does: translate, submit, and answer whole or as a stream."""
    await require_model(host, body.model)
    call = await run_in_threadpool(translate, body, host)
    note(http, call)
    generation = service.generate(list(call.requests))
    if body.stream:
        return EventStream(chunks(call, generation, host.tokens), generation)
    ends = await generation.finished(http)
    return await run_in_threadpool(lambda: JSONResponse(whole(call, ends, host.tokens)))


async def read_aside(http: Request, service: Service, work: Callable[[], Json]) -> Response:
    """The answer of a call that reads the model beside the engine, made on a thread; `READERS` run at a time, the
    others wait in line. Raises ApiError for a client that has left the line."""
    async with service.readers:
        if await http.is_disconnected():
            raise ApiError(499, "The client closed the connection.", code="client_closed")
        return await run_in_threadpool(lambda: JSONResponse(work()))


def note(request: Request, call: Call) -> None:
    """Leave for the log line what a generating request was."""
    request.state.notes = {
        "id": call.id,
        "choices": len(call.requests),
        "prompt_tokens": sum(len(call.requests[index].prompt) for index in call.prompts),
        "steered": call.steered,
    }
