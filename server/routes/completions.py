"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.account import Json, completion_logprobs, receipt, traced, usage
from server.body import json_body
from server.generation import Generation
from server.pieces import End, pieces
from server.routes.common import ERRORS, HostDep, ServiceDep, answered, takes
from server.schema.openai import CompletionRequest
from server.tokens import TokenTable
from server.translate import Call, completion_call
from steering import Finished

router = APIRouter(tags=["OpenAI"])
Body = Annotated[CompletionRequest, Depends(json_body(CompletionRequest, refuse=True))]


@router.post("/v1/completions", responses=ERRORS, openapi_extra=takes(CompletionRequest))
async def complete(http: Request, service: ServiceDep, host: HostDep, body: Body) -> Response:
    """Continue texts, steered by the `steering` object where there is one. Choices of prompt p begin at index p·n."""
    return await answered(http, service, host, body, completion_call, _completion, _chunks)


def _completion(call: Call, ends: Sequence[Finished], table: TokenTable) -> Json:
    text = table.text
    choices = []
    for index, end in enumerate(ends):
        logprobs = None if end.logprobs is None else completion_logprobs(end.logprobs, text)
        choices.append(_choice(index, end.text, logprobs, end))
    answer = {**_head(call), "choices": choices, "usage": usage(ends, call.prompts)}
    if call.steered:
        answer["steering"] = receipt(ends, call.programs, text if call.trace else None)
    return answer


async def _chunks(call: Call, generation: Generation, table: TokenTable) -> AsyncIterator[Json]:
    """Text, each finish reason with an empty text, the receipt, the usage."""
    text = table.text
    ends: dict[int, Finished] = {}
    offsets = [0] * len(call.requests)
    async for piece in pieces(generation):
        end, written = (piece.finished, "") if isinstance(piece, End) else (None, piece.text)
        given = [one.logprob for one in piece.deltas if one.logprob is not None]
        logprobs = None
        if given:
            logprobs = completion_logprobs(given, text, offsets[piece.index])
            offsets[piece.index] += sum(map(len, logprobs["tokens"]))
        chunk = {**_chunk_head(call), "choices": [_choice(piece.index, written, logprobs, end)]}
        if call.trace and piece.deltas:
            chunk["steering"] = traced(piece.deltas, text)
        if end:
            ends[piece.index] = end
        yield chunk
    ordered: Sequence[Finished] = [ends[index] for index in range(len(call.requests))]
    if call.steered:
        yield {**_chunk_head(call), "choices": [], "steering": receipt(ordered, call.programs, None)}
    if call.include_usage:
        yield {**_chunk_head(call), "choices": [], "usage": usage(ordered, call.prompts)}


def _choice(index: int, text: str, logprobs: Json | None, end: Finished | None) -> Json:
    choice: Json = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end.reason if end else None}
    if end:
        choice["stop_reason"] = end.stop_reason
    return choice


def _chunk_head(call: Call) -> Json:
    return {**_head(call), "usage": None} if call.include_usage else _head(call)


def _head(call: Call) -> Json:
    return {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}
