"""`/v1/steering/presets` and `/v1/steering/default`: saved steering objects."""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.types import Message

from server.account import Json
from server.body import json_body
from server.host import Host
from server.presets import Saved
from server.routes.common import ERRORS, HostDep, takes
from server.schema.errors import ApiError
from server.schema.steering import SteeringSpec
from steering import ArtifactCorrupt, echo

router = APIRouter(prefix="/v1/steering", tags=["Steering"])
_read = json_body(SteeringSpec)


class Sent(NamedTuple):
    """A steering object as a body: the document, and what it says."""

    document: dict[str, Any]
    spec: SteeringSpec


async def _sent(request: Request) -> Sent:
    """The body of a request, which is a steering object; it is kept as it came, so that it can be given back so."""
    pieces = []

    async def receive() -> Message:
        message = await request.receive()
        pieces.append(message.get("body", b""))
        return message

    spec = await _read(Request(request.scope, receive))
    return Sent(await run_in_threadpool(json.loads, b"".join(pieces)), spec)


Body = Annotated[Sent, Depends(_sent)]
_WRITES: dict[str, Any] = {
    "responses": {**ERRORS, 201: {"description": "There was none"}},
    "openapi_extra": takes(SteeringSpec),
}


@router.get("/presets", responses=ERRORS)
async def presets(host: HostDep) -> Json:
    """The presets, by name. A damaged file is left out."""
    return {"object": "list", "data": await run_in_threadpool(_listed, host)}


@router.get("/presets/{name}", responses=ERRORS)
async def preset(name: str, host: HostDep) -> Json:
    """A preset as it was sent; 404 when there is none."""
    return _document(await run_in_threadpool(host.presets.find, name), f"preset named {echo(name)}")


@router.put("/presets/{name}", **_WRITES)
async def put_preset(name: str, host: HostDep, body: Body) -> JSONResponse:
    """Save a steering object under a name. It is compiled first: what a request could not say is a 400 here too."""
    is_new = await run_in_threadpool(host.presets.put, name, body.document, body.spec, host.shelf)
    return JSONResponse(body.document, 201 if is_new else 200)


@router.delete("/presets/{name}", responses=ERRORS)
async def remove_preset(name: str, host: HostDep) -> Json:
    """Delete a preset; running requests keep it."""
    _require(await run_in_threadpool(host.presets.remove, name), f"preset named {echo(name)}")
    return {"object": "steering.preset", "name": name, "deleted": True}


@router.get("/default", responses=ERRORS)
async def default(host: HostDep) -> Json:
    """The steering object of every request that does not leave it out, as it was sent; 404 when there is none."""
    return _document(await run_in_threadpool(host.presets.saved_default), "default steering")


@router.put("/default", **_WRITES)
async def put_default(host: HostDep, body: Body) -> JSONResponse:
    """Steer every request from now on that does not say `"default": "replace"`."""
    is_new = await run_in_threadpool(host.presets.put_default, body.document, body.spec, host.shelf)
    return JSONResponse(body.document, 201 if is_new else 200)


@router.delete("/default", responses=ERRORS)
async def remove_default(host: HostDep) -> Json:
    """Steer no request by default; running requests keep it."""
    _require(await run_in_threadpool(host.presets.remove_default), "default steering")
    return {"object": "steering.default", "deleted": True}


def _listed(host: Host) -> list[Json]:
    found = []
    for name in host.presets.names():
        try:
            saved = host.presets.find(name)
        except ArtifactCorrupt:
            continue
        if saved is not None:
            model = f"{host.model_id}:{name}"
            found.append({"name": name, "model": model, "created": saved.created, "steering": saved.document})
    return found


def _document(saved: Saved | None, what: str) -> Json:
    _require(saved is not None, what)
    assert saved is not None
    return saved.document


def _require(is_there: bool, what: str) -> None:
    if not is_there:
        raise ApiError(404, f"There is no {what}.", code="not_found")
