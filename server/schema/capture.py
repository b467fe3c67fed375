"""`POST /v1/capture`: activations of a prompt at chosen sites and positions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.schema.openai import Messages, TokenIds

MAX_SITES = 512
"""Most sites of one capture."""


class CaptureRequest(BaseModel):
    """Strict, as `steering` is: a misspelt site would be numbers of another place."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    prompt: str | TokenIds | None = None
    messages: Messages | None = None
    """Either `prompt` or `messages`."""
    sites: Annotated[list[str], Field(min_length=1, max_length=MAX_SITES, fail_fast=True)]
    """`TAP.LAYER`, as `resid_pre.4` for the input of block 4, or `final`. Taps: resid_pre, resid_post, attn_in,
    attn_out, mlp_act, mlp_out."""
    positions: Literal["all", "last"] | Annotated[list[int], Field(min_length=1, max_length=4096, fail_fast=True)] = (
        "last"
    )
    """Tokens of the prompt; negative ones count from its end."""
