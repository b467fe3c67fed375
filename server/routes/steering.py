"""`/v1/steering/…`: the types of interventions, and the projections of a prompt."""

from __future__ import annotations

from functools import cache, partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import TypeAdapter

from server.account import Json
from server.body import json_body
from server.host import Host
from server.routes.common import ERRORS, HostDep, ServiceDep, read_aside, require_model, takes
from server.schema.openai import TraceRequest
from server.translate import check_length, given_tokens
from steering import REGISTRY, SteeringError, summary, trace_prompt
from steering.evaluation import ENTRIES

router = APIRouter(prefix="/v1/steering", tags=["Steering"])
Trace = Annotated[TraceRequest, Depends(json_body(TraceRequest))]


@router.get("/types")
async def types() -> Json:
    """Every type of intervention: one line of documentation, the kind of plan that it needs, an example on the ready
    artifacts of the embedded model, and its JSON schema."""
    return await run_in_threadpool(_types)


@router.post("/trace", responses=ERRORS, openapi_extra=takes(TraceRequest))
async def trace(http: Request, service: ServiceDep, host: HostDep, body: Trace) -> Response:
    """Projections of a prompt's tokens on concepts, at the input of every layer, without generation."""
    await require_model(host, body.model)
    return await read_aside(http, service, partial(_trace, host, body))


@cache  # to describe them all takes a processor tens of milliseconds
def _types() -> Json:
    examples = {entry.type: entry.request(entry.strengths[1]) for entry in reversed(ENTRIES)}
    data = [
        {
            "type": name,
            "summary": summary(method),
            "plan_kind": getattr(method, "plan_kind", None),
            "example": examples.get(name),
            "schema": TypeAdapter(method).json_schema(),
        }
        for name, method in REGISTRY.items()
    ]
    return {"object": "list", "data": data}


def _trace(host: Host, body: TraceRequest) -> Json:
    tokens = given_tokens(host, body)
    check_length(host, tokens, "prompt" if body.messages is None else "messages")
    concepts = []
    for index, name in enumerate(body.concepts):
        try:
            concepts.append(host.shelf.concept(name))
        except SteeringError as error:
            error.param = f"concepts[{index}]"
            raise
    found = trace_prompt(host.plant, concepts, tokens, body.units)
    return {
        "object": "steering.trace",
        "model": host.model_id,
        "units": body.units,
        "layers": list(range(host.plant.depth)),
        "tokens": [{"id": token, "text": host.tokens.text(token)} for token in tokens],
        "concepts": {one.concept: {"projections": one.in_units, "raw": one.raw} for one in found},
    }
