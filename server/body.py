"""Reading a JSON body: the right content type, not too long, no NaN, and every field of the type it should have.

Python's `json` takes NaN, Infinity and 1e999; JSON has none of them, and a setpoint of Infinity must not get past the
first hop. They are found by walking the document, so that the error can name the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.schema.errors import ApiError, from_validation
from server.schema.openai import unsupported_field

Body = TypeVar("Body", bound=BaseModel)


def json_body(model: type[Body], *, refuse: bool = False) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads the request's body as `model`. `refuse`: apply the table of unsupported fields."""

    async def read(request: Request) -> Body:
        data, raw = await _document(request)
        if refuse and (name := unsupported_field(data)):
            raise ApiError(
                400, f"{name}: not supported by this server; leave it out.", param=name, code="unsupported_field"
            )
        try:
            return model.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False), data) from error

    return read


async def _document(request: Request) -> tuple[dict[str, Any], bytes]:
    """The body as a JSON object, and as bytes. Raises ApiError 400, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Expected the header Content-Type: application/json.", code="unsupported_media_type")
    raw = await _bytes(request, request.app.state.settings.body_limit)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    for path, number in _not_finite(data):
        raise ApiError(400, f"{path}: expected a finite number, got {number}.", param=path, code="invalid_value")
    return data, raw


async def _bytes(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise too_large
            pieces.append(piece)
    except ClientDisconnect as error:
        raise ApiError(400, "The body ended early.", code="invalid_json") from error
    return b"".join(pieces)


def _not_finite(data: object) -> Iterator[tuple[str, str]]:
    """The path of every number that is not finite as a float, without recursion: the document may be deep."""
    stack: list[tuple[str, object]] = [("", data)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            stack += [(f"{path}{'.' if path else ''}{key[:64]}", value) for key, value in node.items()]
        elif isinstance(node, list):
            stack += [(f"{path}[{index}]", value) for index, value in enumerate(node)]
        elif isinstance(node, float) and not math.isfinite(node):
            yield path[:200], "NaN" if math.isnan(node) else "a number out of range"
