"""Which blocks of vLLM's prefix cache a steered request may share.

    extra key of block [a, b)    none where b ≤ first, else one that no other request has

Keys and values of a position depend on all that was done to it and before it. So the blocks in front of the first
position that may be steered are like everybody's, and are shared with everybody; those behind it are nobody else's,
also not of a request with the same program, since what was measured there belongs to one receipt. A client's own
`cache_salt` separates tenants in front of it as ever, and cannot stand in for this key: it is made here, in the engine
core, out of the attachment and the id that vLLM gave the request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from steering.errors import SpecError
from steering.vllm.attachment import ASKED, KEY, MARK

Keys = tuple[tuple[Any, ...] | None, int]
"""Extra keys of a block, and what vLLM's function returns beside them."""


def extra_key(request: Any, end: int) -> tuple[str, str] | None:
    """What a block that ends before position `end` has in its name beyond vLLM's own."""
    args = getattr(request.sampling_params, "extra_args", None) or {}
    attached = args.get(KEY)
    if attached is None or end <= attached["first"]:
        return None
    return (KEY, request.request_id)


def salted(generate: Callable[..., Keys]) -> Callable[..., Keys]:
    """vLLM's `generate_block_hash_extra_keys`, and ours."""

    @wraps(generate)
    def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Keys:
        found, following = generate(request, start_token_idx, end_token_idx, start_mm_idx)
        own = extra_key(request, end_token_idx)
        return (found, following) if own is None else ((*(found or ()), own), following)

    return keys


def check_compiled(request: Any) -> None:
    """Leave the core's mark on a program, without which no worker runs it: its blocks are named as they must be.

    Raises SpecError where a client's steering came as far as here without being compiled.
    """
    args = getattr(request.sampling_params, "extra_args", None) or {}
    attached = args.get(KEY, {})
    is_shaped = isinstance(attached, dict) and (not attached or isinstance(attached.get("first"), int))
    if ASKED in args or not is_shaped:
        raise SpecError(
            ASKED if ASKED in args else KEY,
            expected="a request whose steering was compiled in the front",
            advice="load Setpoint's plugin in the process that takes the requests",
        )
    if attached:
        attached[MARK] = True
