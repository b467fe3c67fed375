"""`/v1/steering/fit`, `/v1/steering/sweep` and the jobs that they start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from server.account import Json
from server.body import json_body
from server.host import Host, Service
from server.jobs import Task
from server.routes.common import ERRORS, HostDep, ServiceDep, require_model, takes
from server.schema.jobs import FitRequest, SweepRequest
from server.stream import DONE, frame
from server.tasks import fit_task, sweep_task

router = APIRouter(prefix="/v1/steering", tags=["Steering"])
EXAMPLES_BYTES = 2**25
"""A fit's body may be so long whatever `--body-limit` says: two classes of examples are more than a prompt."""
Fit = Annotated[FitRequest, Depends(json_body(FitRequest, least=EXAMPLES_BYTES))]
SweepBody = Annotated[SweepRequest, Depends(json_body(SweepRequest))]
QUIET_SECONDS = 15.0
"""Silence after which a comment is sent, so that nobody on the way takes the connection for dead."""


@router.post("/fit", status_code=202, responses=ERRORS, openapi_extra=takes(FitRequest))
async def fit(http: Request, service: ServiceDep, host: HostDep, body: Fit) -> JSONResponse:
    """Queue the fit of a concept. The answer names the job; the artifact can be used as soon as that succeeds."""
    await require_model(host, body.model)
    return await _queued(http, service, host, fit_task, body)


@router.post("/sweep", status_code=202, responses=ERRORS, openapi_extra=takes(SweepRequest))
async def sweep(http: Request, service: ServiceDep, host: HostDep, body: SweepBody) -> JSONResponse:
    """Queue a dose–response curve: effect, perplexity and effort at each dose of a grid."""
    await require_model(host, body.model)
    return await _queued(http, service, host, sweep_task, body)


@router.get("/jobs", responses=ERRORS)
async def jobs(service: ServiceDep) -> Json:
    """The jobs that wait, run or ended of late, oldest first."""
    return {"object": "list", "data": [job.to_json() for job in service.jobs.all()]}


@router.get("/jobs/{id}", responses=ERRORS)
async def job(id: str, service: ServiceDep) -> Json:  # noqa: A002 (the name in the contract's path)
    """One job; 404 when there is none."""
    return service.jobs.get(id).to_json()


@router.get("/jobs/{id}/events", responses=ERRORS, response_class=StreamingResponse)
async def events(id: str, service: ServiceDep) -> StreamingResponse:  # noqa: A002
    """The job as server-sent events: its present state, every change, and `[DONE]` after the final one."""
    service.jobs.get(id)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_frames(service.jobs.watch(id)), media_type="text/event-stream", headers=headers)


@router.delete("/jobs/{id}", responses=ERRORS)
async def cancel(id: str, service: ServiceDep) -> JSONResponse:  # noqa: A002
    """End a job: 200 when it is over, 202 when it ends at its next pause, 409 when it was over already."""
    ended = service.jobs.cancel(id)
    return JSONResponse(ended.to_json(), 200 if ended.is_over else 202)


async def _queued(
    http: Request, service: Service, host: Host, task: Callable[[Any, Host], Task], body: object
) -> JSONResponse:
    made = service.jobs.submit(await run_in_threadpool(task, body, host))
    http.state.notes = {"job": made.id}
    return JSONResponse({"job": made.id}, 202, {"Location": f"/v1/steering/jobs/{made.id}"})


async def _frames(documents: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    """Documents as events, comments where there is none for long, then `[DONE]`."""
    coming = asyncio.ensure_future(anext(documents, None))
    try:
        while True:
            await asyncio.wait((coming,), timeout=QUIET_SECONDS)
            if not coming.done():
                yield b": the job goes on\n\n"
                continue
            document = coming.result()
            if document is None:
                yield DONE
                return
            yield frame(document)
            coming = asyncio.ensure_future(anext(documents, None))
    finally:
        coming.cancel()
