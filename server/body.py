"""Reading a JSON body: the right content type, not too long, no NaN, no key twice, and every field of its type.

Python's `json` takes NaN, Infinity and 1e999; JSON has none of them, and a setpoint of Infinity must not get past the
first hop. Of a key that stands twice in an object most readers take the last value, some the first: whoever checked the
body before us may have read another one. Where any of these was met the document is walked for it, so that the error
can name the field.

All of it runs in a worker thread: a megabyte of JSON takes a while to read, and longer to refuse.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.schema.errors import INVALID_JSON, ApiError, from_validation
from server.schema.openai import is_almost_steering, misplaced_field, unsupported_field

Body = TypeVar("Body", bound=BaseModel)
_SIZES = {"steering": 4096, "targets": 4096, "logit_bias": 4096}
"""Most items of any list or object below these fields: to refuse each of a hundred thousand takes seconds."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Repeating(dict[str, Any]):
    """An object as it was read, of which `key` stood there more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.key = Counter(key for key, _ in pairs).most_common(1)[0][0]


def json_body(model: type[Body], *, refuse: bool = False, least: int = 0) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads the request's body as `model`. `refuse`: apply the table of unsupported fields. `least`:
    bytes that the body may have in any case, for one that holds more than a prompt."""

    async def read(request: Request) -> Body:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "Expected a body without Content-Encoding.", code="unsupported_media_type")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Expected the header Content-Type: application/json.", code="unsupported_media_type")
        raw = await _bytes(request, max(request.app.state.settings.body_limit, least))
        return await run_in_threadpool(parsed, model, raw, refuse=refuse)

    return read


def parsed(model: type[Body], raw: bytes, *, refuse: bool = False) -> Body:
    """`raw` as `model`. Raises ApiError 400."""
    data = _document(raw)
    if refuse and (name := misplaced_field(data, model)):
        where = "the body as `steering`" if is_almost_steering(name.rsplit(".", 1)[-1]) else "`steering`"
        raise ApiError(400, f"{name}: put it into {where}.", param=name, code="misplaced_field")
    if refuse and (name := unsupported_field(data, model)):
        raise ApiError(
            400, f"{name}: not supported by this server; leave it out.", param=name, code="unsupported_field"
        )
    for field, most in _SIZES.items():
        if field in model.model_fields:
            _check_sizes(field, data.get(field), most)
    try:
        return model.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False), data) from error


def _document(raw: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError."""
    invalid = ApiError(400, INVALID_JSON, code="invalid_json")
    odd: list[float] = []
    twice: list[_Repeating] = []

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            odd.append(value)
        return value

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.append(_Repeating(pairs))
            return twice[-1]
        return found

    try:
        data = json.loads(raw.decode("utf-8"), parse_float=number, parse_constant=number, object_pairs_hook=members)
        if _SURROGATE.search(raw):  # half of a pair cannot be written back, not even in an error
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is not valid JSON: {error.msg} at {where}.", code="invalid_json") from error
    except UnicodeEncodeError as error:
        raise ApiError(400, "The body holds half of a surrogate pair.", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise invalid from error
    if not isinstance(data, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    for path in _repeated(data) if twice else ():
        raise ApiError(400, f"{path}: expected once, but it is there twice.", param=path, code="invalid_value")
    for path, found in _not_finite(data) if odd else ():
        raise ApiError(400, f"{path}: expected a finite number, got {found}.", param=path, code="invalid_value")
    return data


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


def _repeated(data: object) -> Iterator[str]:
    """The path of every key that stands twice in its object."""
    stack: list[tuple[str, object]] = [("", data)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, _Repeating):
            yield f"{path}{'.' if path else ''}{node.key[:64]}"[:200]
        stack += _items(path, node, (dict, list))


def _not_finite(data: object) -> Iterator[tuple[str, str]]:
    """The path of every number that is not finite as a float, without recursion: the document may be deep."""
    stack: list[tuple[str, object]] = [("", data)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, float):
            if not math.isfinite(node):
                yield path[:200], "NaN" if math.isnan(node) else "a number out of range"
            continue
        stack += _items(path, node, (float, dict, list))


def _check_sizes(path: str, data: object, most: int) -> None:
    """Raise ApiError for a list or object at or below `path` with more than `most` items."""
    stack = [(path, data)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, (dict, list)) and len(node) > most:
            raise ApiError(
                400,
                f"{path}: expected at most {most} items, got {len(node)}.",
                param=path[:200],
                code="invalid_value",
            )
        stack += _items(path, node, (dict, list))


def _items(path: str, node: object, kinds: tuple[type, ...]) -> list[tuple[str, object]]:
    """The items of these kinds that stand in a list or object, with their paths."""
    if isinstance(node, dict):
        dot = "." if path else ""
        return [(f"{path}{dot}{key[:64]}", value) for key, value in node.items() if isinstance(value, kinds)]
    if isinstance(node, list):
        return [(f"{path}[{index}]", value) for index, value in enumerate(node) if isinstance(value, kinds)]
    return []
