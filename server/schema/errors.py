"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}}, whatever went wrong and wherever.

`from_steering` and `from_validation` turn what the library and pydantic raise into a status and that envelope. A
validation error becomes one sentence about one field.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from server.schema.steering import known_keys
from steering import REGISTRY, SteeringError, echo

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARAM_LIMIT = 200
_SHOWN_LIMIT = 80
INVALID_JSON = "The body is not valid JSON."
_FIELD = re.compile(r"[a-z_]+(\.[a-z_]+|\[\d+\])*")
"""How a message of the library begins that names a field: relative to where it stands, so the full path replaces it."""
_EXTRA = ("extra_forbidden", "unexpected_keyword_argument")
"""What pydantic calls an unknown key, in a model and in a dataclass."""


class ErrorBody(BaseModel):
    """What went wrong: one sentence, the class of the error, the field's path, a stable word."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An error with its HTTP status. Raised by routes, rendered by the application."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The envelope."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = ErrorBody(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorEnvelope(error=error).model_dump()


def from_steering(error: SteeringError) -> ApiError:
    """Status, code and path of an error of the library. The message begins with the full path of its field."""
    message, param = error.message, error.param
    if param:
        param = param[:_PARAM_LIMIT]
        head, colon, rest = message.partition(": ")
        if colon and _FIELD.fullmatch(head):
            message = f"{param}: {rest}"
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return ApiError(error.status, message, param=param, code=error.code, headers=headers)


def from_validation(errors: Sequence[ErrorDetails], data: object) -> ApiError:
    """The 400 for what pydantic refused in `data`. `errors` need not carry their inputs: they are looked up."""
    error = _chief([_untagged(error, data) for error in errors], data)
    if error["type"] == "json_invalid":
        return ApiError(400, INVALID_JSON, code="invalid_json")
    path, parent = _path(error, data)
    value = _follow(data, error["loc"])
    kind, cause = error["type"], error.get("ctx", {}).get("error")
    if isinstance(cause, SteeringError):
        return from_steering(cause.at(path) if path else cause)
    code = "invalid_value"
    if kind == "missing":
        message, code = f"{path}: this field is required.", "missing_field"
    elif kind in _EXTRA:
        above = path.rsplit(".", 1)[0] if "." in path else ""
        keys = known_keys(above, parent)
        message, code = (
            f"{path}: unknown field{'; expected one of ' + ', '.join(keys) if keys else ''}.",
            "unknown_field",
        )
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path += ".type"
        given = value.get("type") if isinstance(value, dict) else None
        message = f"{path}: expected one of {', '.join(REGISTRY)}, got {_shown(given)}."
    elif kind in ("too_long", "too_short"):
        context = error.get("ctx", {})
        bound = f"at most {context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        message = f"{path}: expected {bound} items, got {len(value) if isinstance(value, Sized) else 'others'}."
    elif kind in ("model_type", "dataclass_type", "model_attributes_type"):
        message = f"{path}: expected an object, got {_shown(value)}."
    else:
        said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        message = f"{path}: expected {said}, got {_shown(value)}."
    return ApiError(400, message, param=path[:_PARAM_LIMIT] or None, code=code)


def _untagged(error: ErrorDetails, data: object) -> ErrorDetails:
    """The error without the names of types in its path: pydantic puts them behind the index of an intervention, where
    `heads` or `sparsity` would be taken for the field of that name."""
    node, loc = data, []
    for index, step in enumerate(error["loc"]):
        behind_index = index > 0 and isinstance(error["loc"][index - 1], int)
        if behind_index and step in REGISTRY and isinstance(node, dict) and node.get("type") == step:
            continue
        node = node[step] if _has(node, step) else node  # type: ignore[index]
        loc.append(step)
    return {**error, "loc": tuple(loc)}


def _shown(value: object) -> str:
    """A value of the body for a message, cut as `echo` cuts it, but null, true and false as JSON writes them."""
    if isinstance(value, (bool, dict, list, NoneType)):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= _SHOWN_LIMIT else f"{text[: _SHOWN_LIMIT - 1]}…"
    return echo(value)


def _chief(errors: Sequence[ErrorDetails], data: object) -> ErrorDetails:
    """The error to report: the first, of a union's branches the best fit, an unknown key before a missing one."""
    depth = 0
    while (tag := _tag_position(errors[0], data, depth)) is not None:
        stem = errors[0]["loc"][:tag]
        rivals = [e for e in errors if e["loc"][:tag] == stem and len(e["loc"]) > tag]
        errors = _best_branch(rivals, tag, _follow(data, stem))
        depth = tag + 1
    return next((e for e in errors if e["type"] in _EXTRA), errors[0])


def _best_branch(rivals: Sequence[ErrorDetails], tag: int, value: object) -> list[ErrorDetails]:
    """Of a union's branches, which all refused `value`, the errors of the one that it seems to be meant for."""
    counts = Counter(e["loc"][tag] for e in rivals)

    def misfit(error: ErrorDetails) -> tuple[bool, int]:
        is_whole = len(error["loc"]) == tag + 1
        wants_object = is_whole and error["type"] in ("dataclass_type", "model_type")
        wants_word = is_whole and error["type"] == "literal_error" and isinstance(value, (dict, list))
        wants_other = is_whole and error["type"].endswith("_type")
        return wants_object or wants_word or wants_other, counts[error["loc"][tag]]

    best = min(rivals, key=misfit)["loc"][tag]
    return [e for e in rivals if e["loc"][tag] == best]


def _tag_position(error: ErrorDetails, data: object, start: int) -> int | None:
    """Index in `loc`, from `start` on, of the name of a union's branch: what is no key of the data. Else None."""
    node = data
    for index, step in enumerate(error["loc"]):
        is_last = index == len(error["loc"]) - 1
        if _has(node, step):
            node = node[step]  # type: ignore[index]
        elif index >= start:
            return None if is_last and error["type"] == "missing" and isinstance(node, (dict, list)) else index
    return None


def _path(error: ErrorDetails, data: object) -> tuple[str, object]:
    """The dotted path of the field and the object it stands in. Names of a union's branches are left out."""
    node, parent, path = data, data, ""
    for index, step in enumerate(error["loc"]):
        is_last = index == len(error["loc"]) - 1
        if _has(node, step):
            parent, node = node, node[step]  # type: ignore[index]
        elif not (is_last and error["type"] == "missing" and isinstance(node, (dict, list))):
            continue
        path += f"[{step}]" if isinstance(step, int) else f"{'.' if path else ''}{step[:64]}"
    return path, parent


def _follow(data: object, loc: Sequence[int | str]) -> object:
    for step in loc:
        data = data[step] if _has(data, step) else data  # type: ignore[index]
    return data


def _has(node: object, step: int | str) -> bool:
    if isinstance(node, dict):
        return step in node
    return isinstance(node, list) and isinstance(step, int) and 0 <= step < len(node)
