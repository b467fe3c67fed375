"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from server.account import (
    Json,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
    receipt,
    spelled,
    traced,
    usage,
)
from server.body import json_body
from server.generation import Generation
from server.pieces import End, Piece, pieces
from server.routes.common import ERRORS, HostDep, ServiceDep, answered, takes
from server.schema.openai import CompletionRequest
from server.tokens import TokenTable
from server.translate import Call, completion_call
from steering import Finished, TokenLogprob

router = APIRouter(tags=["OpenAI"])
Body = Annotated[CompletionRequest, Depends(json_body(CompletionRequest, refuse=True))]


@router.post("/v1/completions", responses=ERRORS, openapi_extra=takes(CompletionRequest))
async def complete(http: Request, service: ServiceDep, host: HostDep, body: Body) -> Response:
    """Continue texts, steered by the `steering` object where there is one. Choices of prompt p begin at index p·n."""
    return await answered(http, service, host, body, completion_call, _completion, _chunks)


def _completion(call: Call, ends: Sequence[Finished], table: TokenTable) -> Json:
    choices = []
    for index, end in enumerate(ends):
        echo, logprobs = call.echo[index] if call.echo else "", None
        if end.logprobs is not None:
            logprobs = completion_logprobs(end.logprobs, table, len(echo))
            if call.echo:
                logprobs = _joined(_echoed(call, index, end.prompt_logprobs, table), logprobs)
        choice = _choice(index, echo + end.text, logprobs, end)
        if call.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(end.prompt_logprobs or (), call.prompt_logprobs, table)
        if call.token_ids:
            choice |= {"prompt_token_ids": list(call.requests[index].prompt), "token_ids": list(end.tokens)}
        choices.append(choice)
    answer = {**_head(call), "choices": choices, "usage": usage(ends, call.prompts)}
    if call.steered:
        answer["steering"] = receipt(ends, call.programs, table.text if call.trace else None)
    return answer


async def _chunks(call: Call, generation: Generation, table: TokenTable) -> AsyncIterator[Json]:
    """The prompt where it is echoed, text, each finish reason with an empty text, the receipt, the usage."""
    ends: dict[int, Finished] = {}
    offsets = [len(call.echo[index]) if call.echo else 0 for index in range(len(call.requests))]
    begun: set[int] = set()
    async for piece in pieces(generation):
        index = piece.index
        opening = {"prompt_token_ids": list(call.requests[index].prompt)} if call.token_ids else {}
        if call.echo and index not in begun:
            yield _chunk(call, await run_in_threadpool(_echo, call, piece, table) | opening)
        end, written = (piece.finished, "") if isinstance(piece, End) else (None, piece.text)
        given = [one.logprob for one in piece.deltas if one.logprob is not None]
        logprobs = None
        if given:
            logprobs = completion_logprobs(given, table, offsets[index])
            offsets[index] += spelled(given, table)
        choice = _choice(index, written, logprobs, end)
        if call.token_ids:
            choice["token_ids"] = [delta.token for delta in piece.deltas]
        if index not in begun and not call.echo:
            choice |= opening
        begun.add(index)
        chunk = _chunk(call, choice)
        if call.trace and piece.deltas:
            chunk["steering"] = traced(piece.deltas, table.text)
        if end:
            ends[index] = end
        yield chunk
    ordered: Sequence[Finished] = [ends[index] for index in range(len(call.requests))]
    if call.steered:
        yield {**_chunk_head(call), "choices": [], "steering": receipt(ordered, call.programs, None)}
    if call.include_usage:
        yield {**_chunk_head(call), "choices": [], "usage": usage(ordered, call.prompts)}


def _echo(call: Call, first: Piece | End, table: TokenTable) -> Json:
    """The choice that brings the prompt. `first`: what its request delivered first."""
    logprobs = None
    if call.requests[first.index].sampling.logprobs is not None:
        logprobs = _echoed(call, first.index, first.prompt_logprobs, table)
    choice = _choice(first.index, call.echo[first.index], logprobs, None)
    return choice | {"token_ids": []} if call.token_ids else choice


def _echoed(call: Call, index: int, logprobs: Sequence[TokenLogprob | None] | None, table: TokenTable) -> Json:
    """The log-probabilities of an echoed prompt."""
    request = call.requests[index]
    return echoed_logprobs(call.echo[index], request.prompt, logprobs or (), request.sampling.logprobs or 0, table)


def _joined(first: Json, second: Json) -> Json:
    return {name: [*values, *second[name]] for name, values in first.items()}


def _choice(index: int, text: str, logprobs: Json | None, end: Finished | None) -> Json:
    choice: Json = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end.reason if end else None}
    if end:
        choice["stop_reason"] = end.stop_reason
    return choice


def _chunk(call: Call, choice: Json) -> Json:
    return {**_chunk_head(call), "choices": [choice]}


def _chunk_head(call: Call) -> Json:
    return {**_head(call), "usage": None} if call.include_usage else _head(call)


def _head(call: Call) -> Json:
    return {"id": call.id, "object": "text_completion", "created": call.created, "model": call.model}
