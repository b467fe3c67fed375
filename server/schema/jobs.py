"""Bodies of the jobs: `POST /v1/steering/fit` and `POST /v1/steering/sweep`. Strict: an unknown key is refused.

Types only: names, rows and doses are checked in `server.tasks`, before the job is queued.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, create_model

from server.schema.openai import Messages
from steering import Scope
from steering.fit import MAX_EXAMPLES, PositionRule
from steering.fit.plans import FITS
from steering.types import Gains

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TextRow(BaseModel):
    """An example as a line of a JSONL file has it."""

    model_config = _STRICT

    text: str


class ChatRow(BaseModel):
    """A chat as a line of a JSONL file has it."""

    model_config = _STRICT

    messages: Messages


def _kind_of_row(value: object) -> str:
    if isinstance(value, (dict, BaseModel)):
        return "chat row" if isinstance(value, ChatRow) or (isinstance(value, dict) and "messages" in value) else "row"
    return "chat" if isinstance(value, list) else "text"


Row = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Messages, Tag("chat")]
    | Annotated[TextRow, Tag("row")]
    | Annotated[ChatRow, Tag("chat row")],
    Discriminator(_kind_of_row),
]
"""One example: a text, a chat, or an object with `text` or `messages`."""


def plain(row: Any) -> str | list[dict[str, Any]]:
    """A row as the library takes it: a text, or messages with `role` and `content`."""
    if isinstance(row, TextRow):
        return row.text
    if isinstance(row, ChatRow):
        row = row.messages
    return row if isinstance(row, str) else [dict(message.plain()) for message in row]


class ConceptMethod(BaseModel):
    """How a concept or a plan is fitted. What is absent or null takes the library's default; a field that the kind does
    not have is refused."""

    model_config = _STRICT

    direction: Literal["mean_difference"] | None = None
    gains: Gains | Annotated[list[Gains], Field(min_length=1, max_length=3)] | None = None
    """One kind of gain, or several, of which the first is the concept's default; `dense` when absent."""
    q: float | None = None
    """Price of the error at every controlled layer's input."""
    r: float | None = None
    """Price of the control."""
    q_f: float | None = None
    """Price of the error after the last controlled layer."""
    jacobian_prompts: int | None = None
    """Examples along which the model is linearised."""
    positions: PositionRule | None = None
    """Tokens that are averaged: of a chat the `answer`, its `late` half, or its `last` token; `all` of a text."""
    skip: int | None = None
    """Leading tokens of a text that `all` leaves out."""
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    """Controlled blocks, consecutive; or those that a plan is made for."""


def _plan_fields() -> dict[str, Any]:
    """The settings of every kind of plan, as optional fields that say whose they are."""
    types: dict[str, list[Any]] = {}
    texts: dict[str, list[str]] = {}
    for kind, fitter in FITS.items():
        known = TypeAdapter(fitter.settings).json_schema()["properties"]
        hints = get_type_hints(fitter.settings)
        for setting in fields(fitter.settings):
            if setting.name in ConceptMethod.model_fields:
                continue
            types.setdefault(setting.name, []).append(hints[setting.name])
            told = f"`{kind}`: {known[setting.name].get('description', '')}".strip()
            texts.setdefault(setting.name, []).append(f"{told} Default {json.dumps(setting.default)}.")
    return {
        name: (reduce(or_, dict.fromkeys(types[name])) | None, Field(None, description="\n".join(texts[name])))
        for name in types
    }


FitMethod: Any = create_model("FitMethod", __base__=ConceptMethod, **_plan_fields())
FitMethod.__doc__ = ConceptMethod.__doc__
FitKind: Any = Literal[("concept", *FITS)]


class FitRequest(BaseModel):
    """`POST /v1/steering/fit`: make a concept or a plan of positive and negative examples."""

    model_config = _STRICT

    name: str
    """What the artifact is to be called."""
    kind: FitKind = "concept"
    """What is made: a concept, or a plan of this kind."""
    model: str | None = None
    """The served model's id; absent means that one."""
    positive: Annotated[list[Row], Field(max_length=MAX_EXAMPLES, fail_fast=True)] = []
    """Examples of the concept; for a kind that needs one set, its calibration texts."""
    negative: Annotated[list[Row], Field(max_length=MAX_EXAMPLES, fail_fast=True)] = []
    """Examples of its absence, or of its opposite; none for a kind that needs one set, or none."""
    method: FitMethod = FitMethod()


Prompt = Annotated[Annotated[str, Tag("text")] | Annotated[Messages, Tag("chat")], Discriminator(_kind_of_row)]


class SweepRequest(BaseModel):
    """`POST /v1/steering/sweep`: one intervention on a concept at a grid of doses."""

    model_config = _STRICT

    concept: str
    type: str = "lqr"
    """An intervention on a concept. The doses are its `setpoint` where it has one, else its `strength`."""
    grid: Annotated[list[float], Field(min_length=1, max_length=32, fail_fast=True)]
    """The doses λ."""
    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=64, fail_fast=True)] | None = None
    """Texts or chats to be continued; absent, for a ready concept of the embedded model, its held-out prompts."""
    apply: Scope | None = None
    """Positions and steps to act on, as in `steering.interventions`."""
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] = 0
    """Prompt i is answered from seed + i at every dose."""
    judge: str | None = None
    """Name of a judge; absent, that of the concept where it is one of the embedded model's, else projections alone."""
    model: str | None = None
    """The served model's id; absent means that one."""
