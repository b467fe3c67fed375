"""`/v1/steering/artifacts`: the store over HTTP.

An upload is a raw body, of ours or a GGUF control vector. It is written to a file that no listing shows, read and
verified there, and saved anew under the name of its address: nothing that a client sent becomes visible unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from server.account import Json
from server.host import Host, reading
from server.routes.common import ERRORS, HostDep, ServiceDep
from server.schema.errors import ApiError
from steering import Artifact, ArtifactCorrupt, ArtifactError, ArtifactNotFound, SpecError
from steering.artifact import MAX_BYTES, checked_name, partial_file, read_header
from steering.formats.gguf import exported, hint_of, imported, is_gguf, read_vectors
from steering.store import held_in

router = APIRouter(prefix="/v1/steering/artifacts", tags=["Steering"])
OCTETS = "application/octet-stream"
_BINARY = (
    "",
    OCTETS,
    "application/x-gguf",
    "application/vnd.safetensors",
    "application/x-safetensors",
    "binary/octet-stream",
)
_FLUSH = 2**20
"""Bytes that are gathered before a thread writes them."""
_BYTES: dict[str, Any] = {"content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}


@router.get("", responses=ERRORS)
async def artifacts(host: HostDep) -> Json:
    """The artifacts of the store, by name. `usable` tells which were fitted on the served model."""
    entries = await run_in_threadpool(host.store.entries)
    return {"object": "list", "data": [{**asdict(entry), "usable": host.is_usable(entry.model)} for entry in entries]}


@router.get("/{name}", responses=ERRORS)
async def artifact(name: str, host: HostDep) -> Json:
    """One artifact, read and verified; 404 when there is none."""
    return await run_in_threadpool(_described, host, name)


@router.delete("/{name}", responses=ERRORS)
async def remove(name: str, http: Request, service: ServiceDep, host: HostDep) -> Json:
    """Delete an artifact; 409 while a running request, a job, a preset or the server's default uses it, and for one
    that ships with the model."""
    is_running = service.runs_with(name) or getattr(http.state, "is_used", False)  # here, or on another replica
    users = ["a running request"] * is_running + ["a job"] * service.jobs.reads(name)
    await run_in_threadpool(_remove, host, name, users)
    return {"object": "steering.artifact", "name": name, "deleted": True}


@router.get("/{name}/content", responses={**ERRORS, 200: _BYTES}, response_class=Response)
async def download(
    name: str, http: Request, host: HostDep, kind: Annotated[str, Query(alias="format")] = "safetensors"
) -> Response:
    """The file: `safetensors`, or with `format=gguf` the control vectors of a concept."""
    if kind not in ("safetensors", "gguf"):
        raise SpecError("format", expected="safetensors or gguf", got=kind)
    body, tag = await run_in_threadpool(_content, host, name, kind)
    headers = {"ETag": f'"{tag}"', "Content-Disposition": f'attachment; filename="{name}.{kind}"'}
    known = [one.strip().removeprefix("W/") for one in http.headers.get("if-none-match", "").split(",")]
    if "*" in known or headers["ETag"] in known:
        return Response(status_code=304, headers={"ETag": headers["ETag"]})
    return Response(body, media_type=OCTETS, headers=headers)


@asynccontextmanager
async def uploaded(request: Request, folder: Path, limit: int) -> AsyncIterator[Path]:
    """The request's body as a file in `folder`, gone after the block. Raises ApiError 413, 415, 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _BINARY:
        expected = f"Expected the file as the body, with the header Content-Type: {OCTETS}."
        raise ApiError(415, expected, code="unsupported_media_type")
    too_large = ApiError(413, f"The file is larger than {limit} bytes.", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    with partial_file(folder) as path, path.open("wb") as file:
        pieces, gathered, size = list[bytes](), 0, 0
        try:
            async for piece in request.stream():
                size, gathered = size + len(piece), gathered + len(piece)
                if size > limit:
                    raise too_large
                pieces.append(piece)
                if gathered >= _FLUSH:
                    await asyncio.to_thread(file.write, b"".join(pieces))
                    pieces, gathered = [], 0
            await asyncio.to_thread(file.write, b"".join(pieces))
            file.flush()
        except ClientDisconnect as error:
            raise ApiError(400, "The body ended early.", code="incomplete_body") from error
        except OSError as error:
            raise ApiError(503, "The store has no room for this file.", code="store_full") from error
        yield path


async def _upload(name: str, request: Request, host: HostDep) -> tuple[Json, bool]:
    """Receive, verify and save; the artifact's description, and whether its name is new."""
    await run_in_threadpool(host.store.require_own, name)
    limit = min(request.app.state.settings.upload_limit, MAX_BYTES)
    async with uploaded(request, host.store.folder, limit) as path:
        return await run_in_threadpool(_save, host, name, path)


@router.put(
    "/{name}/content",
    responses={**ERRORS, 201: {"description": "The name is new"}},
    openapi_extra={"requestBody": {"required": True, **_BYTES}},
)
async def upload(done: Annotated[tuple[Json, bool], Depends(_upload)]) -> JSONResponse:
    """Save a file under a name: safetensors as `GET` gives it, or a GGUF control vector, which becomes a concept.

    409 for another model's, with both sides named; 400 for a damaged one.
    """
    described, is_new = done
    return JSONResponse(described, 201 if is_new else 200)


def _described(host: Host, name: str) -> Json:
    found = host.describe(name)
    return {**found, "usable": host.is_usable(found["model"])}


def _remove(host: Host, name: str, users: list[str]) -> None:
    """Raises ArtifactNotFound, also for an impossible name, and ArtifactError for a built-in one or one in use."""
    with host.presets.lock, reading(host.store, name) as path:
        if path.parent != host.store.builtin and (users := [*users, *host.presets.users(name)]):
            raise ArtifactError(
                f"Artifact {name!r} is in use by {', '.join(users[:8])}; wait for it, or take it out of there.",
                param="name",
            )
        host.store.remove(name)


def _content(host: Host, name: str, kind: str) -> tuple[bytes, str]:
    """The bytes of one artifact and their tag. Raises ArtifactNotFound, ArtifactCorrupt, SpecError, ArtifactError."""
    with reading(host.store, name) as path:
        found = Artifact.load(path)
        if kind == "safetensors":
            raw = path.read_bytes()
            while read_header(path)["content"] != found.fingerprint:  # it was replaced meanwhile
                found, raw = Artifact.load(path), path.read_bytes()
            return raw, found.fingerprint
    if not host.is_usable(found.model) and not hint_of(found):
        raise ArtifactError(
            f"Artifact {name!r} was fitted on model {found.model[:19]}…, whose architecture this server, with model "
            f"{host.plant.fingerprint[:19]}…, does not know; export it beside its own model.",
            param="name",
        )
    return exported(found, host.target.hints[-1]), f"{found.fingerprint}-gguf"


def _save(host: Host, name: str, path: Path) -> tuple[Json, bool]:
    """Verify an uploaded file and save it under `name`.

    Raises ApiError 400 for a damaged file, StaleFingerprint for one of another model.
    """
    try:
        found = imported(read_vectors(path), name, host.target) if is_gguf(path) else _ours(path, name)
    except ArtifactCorrupt as error:
        raise ApiError(400, error.message, code=error.code) from error
    host.shelf.require_own(held_in(found), name)
    with host.presets.lock:
        try:
            is_new = host.store.path(name).parent != host.store.folder
        except ArtifactNotFound:
            is_new = True
        host.store.save(found)
    return _described(host, name), is_new


def _ours(path: Path, name: str) -> Artifact:
    """A file of ours under its new name. Raises ArtifactCorrupt for one that is damaged, or of a kind there is not."""
    checked_name(name)
    try:
        found = replace(Artifact.load(path), name=name)
    except ArtifactCorrupt as error:  # which tells the name of the file that was received
        error.message = error.message.replace(repr(path.name), repr(name))
        raise
    held_in(found)
    return found
