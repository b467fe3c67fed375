"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.account import Json, chat_logprobs, prompt_logprobs, receipt, traced, usage
from server.body import json_body
from server.generation import Generation
from server.pieces import End, pieces
from server.routes.common import ERRORS, HostDep, ServiceDep, answered, takes
from server.schema.openai import ChatRequest
from server.tokens import TokenTable
from server.translate import Call, chat_call
from steering import Delta, Finished

router = APIRouter(tags=["OpenAI"])
Body = Annotated[ChatRequest, Depends(json_body(ChatRequest, refuse=True))]


@router.post("/v1/chat/completions", responses=ERRORS, openapi_extra=takes(ChatRequest))
async def chat(http: Request, service: ServiceDep, host: HostDep, body: Body) -> Response:
    """Answer a chat, steered by the `steering` object where there is one."""
    return await answered(http, service, host, body, chat_call, _completion, _chunks)


def _completion(call: Call, ends: Sequence[Finished], table: TokenTable) -> Json:
    choices: list[Json] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": end.text, "refusal": None},
            "logprobs": None if end.logprobs is None else chat_logprobs(end.logprobs, table),
            "finish_reason": end.reason,
            "stop_reason": end.stop_reason,
        }
        for index, end in enumerate(ends)
    ]
    body = {**_head(call, "chat.completion"), "choices": choices, "usage": usage(ends, call.prompts)}
    if call.prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_logprobs(ends[0].prompt_logprobs or (), call.prompt_logprobs, table)
    if call.token_ids:
        body["prompt_token_ids"] = list(call.requests[0].prompt)
        for choice, end in zip(choices, ends, strict=True):
            choice["token_ids"] = list(end.tokens)
    if call.steered:
        body["steering"] = receipt(ends, call.programs, table.text if call.trace else None)
    return body


async def _chunks(call: Call, generation: Generation, table: TokenTable) -> AsyncIterator[Json]:
    """Role once, text, each finish reason with an empty delta, the receipt, the usage."""
    for index in range(len(call.requests)):
        opening = _chunk(call, index, {"role": "assistant", "content": ""}, (), table)
        yield opening | {"prompt_token_ids": list(call.requests[0].prompt)} if call.token_ids and not index else opening
    ends: dict[int, Finished] = {}
    async for piece in pieces(generation):
        if isinstance(piece, End):
            ends[piece.index] = piece.finished
            yield _chunk(call, piece.index, {}, piece.deltas, table, piece.finished)
        else:
            yield _chunk(call, piece.index, {"content": piece.text}, piece.deltas, table)
    ordered = [ends[index] for index in range(len(call.requests))]
    if call.steered:
        yield {**_chunk_head(call), "choices": [], "steering": receipt(ordered, call.programs, None)}
    if call.include_usage:
        yield {**_chunk_head(call), "choices": [], "usage": usage(ordered, call.prompts)}


def _chunk(
    call: Call, index: int, delta: Json, deltas: Sequence[Delta], table: TokenTable, end: Finished | None = None
) -> Json:
    logprobs = [one.logprob for one in deltas if one.logprob is not None]
    choice: Json = {
        "index": index,
        "delta": delta,
        "logprobs": chat_logprobs(logprobs, table) if logprobs else None,
        "finish_reason": end.reason if end else None,
    }
    if end:
        choice["stop_reason"] = end.stop_reason
    if call.token_ids:
        choice["token_ids"] = [delta.token for delta in deltas]
    body = {**_chunk_head(call), "choices": [choice]}
    if call.trace and deltas:
        body["steering"] = traced(deltas, table.text)
    return body


def _chunk_head(call: Call) -> Json:
    head = _head(call, "chat.completion.chunk")
    return {**head, "usage": None} if call.include_usage else head


def _head(call: Call, kind: str) -> Json:
    return {"id": call.id, "object": kind, "created": call.created, "model": call.model}
