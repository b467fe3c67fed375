"""`POST /v1/capture`: what the model holds at chosen sites, as tensors in base64."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.account import Json
from server.body import json_body
from server.host import Host
from server.routes.common import ERRORS, HostDep, ServiceDep, read_aside, require_model, takes
from server.schema.capture import CaptureRequest
from server.translate import check_length, given_tokens
from steering import PlantError, Site, SpecError, capture, encoded

MAX_BYTES = 2**26
"""Largest answer, in bytes of numbers."""
_SITE = re.compile(r"(resid_pre|resid_post|attn_in|attn_out|mlp_act|mlp_out)\.(0|[1-9][0-9]{0,3})|final")

router = APIRouter(tags=["Steering"])
Body = Annotated[CaptureRequest, Depends(json_body(CaptureRequest))]


@router.post("/v1/capture", responses=ERRORS, openapi_extra=takes(CaptureRequest))
async def captured(http: Request, service: ServiceDep, host: HostDep, body: Body) -> Response:
    """Activations of a prompt, unsteered, in float32. `resid_pre.l` is what laws, traces and conditions read."""
    await require_model(host, body.model)
    return await read_aside(http, service, partial(_captured, host, body))


def _captured(host: Host, body: CaptureRequest) -> Json:
    tokens = given_tokens(host, body)
    check_length(host, tokens, "prompt" if body.messages is None else "messages")
    sites = [_site(host, index, text) for index, text in enumerate(body.sites)]
    positions = _positions(body.positions, len(tokens))
    size = 4 * len(positions) * sum(host.plant.width_of(site) for site in sites)
    if size > MAX_BYTES:
        raise SpecError(
            "positions", expected=f"at most {MAX_BYTES} bytes of numbers", got=size, advice="ask for fewer at a time"
        )
    states = capture(host.plant, [tokens], sites, [positions], skip=0)
    return {
        "object": "capture",
        "model": host.model_id,
        "positions": positions,
        "tokens": [{"id": tokens[position], "text": host.tokens.text(tokens[position])} for position in positions],
        "data": {str(site): encoded(states[site][0]) for site in sites},
    }


def _site(host: Host, index: int, text: str) -> Site:
    """The site that `text` names. Raises SpecError, also for one that this model does not have."""
    path = f"sites[{index}]"
    match = _SITE.fullmatch(text)
    if match is None:
        raise SpecError(path, expected="TAP.LAYER such as resid_pre.4, or final", got=text)
    site = Site("final", 0) if text == "final" else Site(match[1], int(match[2]))
    try:
        host.plant.width_of(site)
    except PlantError as error:
        error.param = path
        raise
    return site


def _positions(given: str | list[int], length: int) -> list[int]:
    """Positions from 0 of a prompt of `length` tokens, in the order given. Raises SpecError for one outside."""
    if given == "all":
        return list(range(length))
    chosen = [-1] if given == "last" else given
    for index, position in enumerate(chosen):
        assert isinstance(position, int)
        if not -length <= position < length:
            raise SpecError(f"positions[{index}]", expected=f"a position of the prompt's {length} tokens", got=position)
    return [int(position) % length for position in chosen]
