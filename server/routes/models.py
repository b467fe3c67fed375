"""`/v1/models`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool

from server.account import Json
from server.body import json_body
from server.host import Host
from server.routes.common import ERRORS, HostDep, require_model, takes
from server.schema.openai import DetokenizeRequest, TokenizeRequest
from server.translate import given_tokens

router = APIRouter(tags=["OpenAI"])
Tokenize = Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
Detokenize = Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]


@router.get("/v1/models", responses=ERRORS)
async def models(host: HostDep) -> Json:
    """The served model, and each of its presets as a model of its own."""
    presets = await run_in_threadpool(host.presets.names)
    return {"object": "list", "data": [_model(host), *(_model(host, preset) for preset in presets)]}


@router.get("/v1/models/{model:path}", responses=ERRORS)
async def model(model: str, host: HostDep) -> Json:
    """One model; 404 for any but the served one and its presets."""
    await require_model(host, model)
    return _model(host, host.preset_of(model))


@router.post("/tokenize", responses=ERRORS, openapi_extra=takes(TokenizeRequest))
async def tokenize(host: HostDep, body: Tokenize) -> Json:
    """Token ids of a prompt or a chat."""
    await require_model(host, body.model)
    return await run_in_threadpool(_tokenized, host, body)


@router.post("/detokenize", responses=ERRORS, openapi_extra=takes(DetokenizeRequest))
async def detokenize(host: HostDep, body: Detokenize) -> Json:
    """The text of token ids, special tokens included."""
    await require_model(host, body.model)
    return {
        "prompt": await run_in_threadpool(lambda: host.plant.tokenizer.decode(host.check_tokens(body.tokens, "tokens")))
    }


def _tokenized(host: Host, body: TokenizeRequest) -> Json:
    tokens = _tokens(host, body)
    strings = host.plant.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {"count": len(tokens), "max_model_len": host.context, "tokens": tokens, "token_strs": strings}


def _tokens(host: Host, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None and body.messages is None and not body.add_special_tokens:
        return list(host.plant.tokenizer(body.prompt, add_special_tokens=False).input_ids)
    return given_tokens(host, body)


def _model(host: Host, preset: str | None = None) -> Json:
    massive = host.plant.massive
    return {
        "id": host.model_id if preset is None else f"{host.model_id}:{preset}",
        "object": "model",
        "created": host.created,
        "owned_by": "setpoint",
        "root": host.model_id,
        "parent": None if preset is None else host.model_id,
        "max_model_len": host.context,
        "fingerprint": host.plant.fingerprint,
        # What no intervention touches unless it asks to: see `steering.plant.massive`.
        "massive": {
            "dims": sorted({dim for dims in massive.dims for dim in dims}),
            "position_0": massive.first,
            "tokens": list(massive.tokens),
        },
    }
