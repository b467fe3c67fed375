"""`POST /v1/generate`: native generation, side by side with the unsteered twin where asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.account import Json, completion_logprobs, prompt_logprobs, receipt, spelled, traced, usage
from server.body import json_body
from server.generation import Generation
from server.pieces import End, pieces
from server.routes.common import ERRORS, HostDep, ServiceDep, answered, takes
from server.schema.openai import GenerateRequest
from server.tokens import TokenTable
from server.translate import Call, generate_call
from steering import Finished

router = APIRouter(tags=["Setpoint"])
Body = Annotated[GenerateRequest, Depends(json_body(GenerateRequest, refuse=True))]
STREAMS = ("steered", "unsteered")
"""Names of the two requests of a comparison, by index."""


@router.post("/v1/generate", responses=ERRORS, openapi_extra=takes(GenerateRequest))
async def generate(http: Request, service: ServiceDep, host: HostDep, body: Body) -> Response:
    """Continue a prompt or a chat. With `compare` the unsteered twin runs in the same batch from the same seed."""
    return await answered(http, service, host, body, generate_call, _answer, _chunks)


def _answer(call: Call, ends: Sequence[Finished], table: TokenTable) -> Json:
    text = table.text
    answer = {"id": call.id, "model": call.model, **_account(call, ends[0], table)}
    if call.token_ids:
        answer["prompt_token_ids"] = list(call.requests[0].prompt)
    if call.steered:
        answer["steering"] = receipt(ends[:1], call.programs[:1], text if call.trace else None)
    if len(ends) > 1:
        answer["unsteered"] = _account(call, ends[1], table)
    return answer


async def _chunks(call: Call, generation: Generation, table: TokenTable) -> AsyncIterator[Json]:
    """Text of both streams as it comes, the end of each with its usage, the receipt, the usage where asked for."""
    text = table.text
    names = STREAMS if call.steered or len(call.requests) > 1 else STREAMS[1:]
    ends: dict[int, Finished] = {}
    offsets, begun = [0] * len(call.requests), False
    async for piece in pieces(generation):
        chunk: Json = {"id": call.id, "model": call.model, "stream": names[piece.index]}
        logprobs = [one.logprob for one in piece.deltas if one.logprob is not None]
        if isinstance(piece, End):
            ends[piece.index] = piece.finished
            chunk |= {"text": "", "finish_reason": piece.finished.reason, "usage": usage([piece.finished], [0])}
        else:
            chunk |= {"text": piece.text, "finish_reason": None}
        if call.token_ids:
            if not begun:
                chunk["prompt_token_ids"] = list(call.requests[0].prompt)
            chunk["token_ids"] = [delta.token for delta in piece.deltas]
        begun = True
        if logprobs:
            chunk["logprobs"] = completion_logprobs(logprobs, table, offsets[piece.index])
            offsets[piece.index] += spelled(logprobs, table)
        if call.trace and piece.deltas and piece.index == 0:
            chunk["steering"] = traced(piece.deltas, text)
        yield chunk
    if call.steered:
        steering = receipt([ends[0]], call.programs[:1], None)
        yield {"id": call.id, "model": call.model, "stream": names[0], "steering": steering}
    if call.include_usage:
        both = {"usage": usage([ends[0]], [0])} | ({"unsteered": {"usage": usage([ends[1]], [0])}} if 1 in ends else {})
        yield {"id": call.id, "model": call.model, "stream": names[0], **both}


def _account(call: Call, end: Finished, table: TokenTable) -> Json:
    """Text, reason, usage and what else was asked for of one request."""
    account: Json = {"text": end.text, "finish_reason": end.reason, "usage": usage([end], [0])}
    if end.logprobs is not None:
        account["logprobs"] = completion_logprobs(end.logprobs, table)
    if call.prompt_logprobs is not None:
        account["prompt_logprobs"] = prompt_logprobs(end.prompt_logprobs or (), call.prompt_logprobs, table)
    if call.token_ids:
        account["token_ids"] = list(end.tokens)
    return account
