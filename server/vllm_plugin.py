"""The entry point of vLLM's plugins: each of vLLM's processes calls `register`, so little is imported here.

`AsyncLLM.generate` is where every request of vLLM's own server passes. One that asks for steering takes the way of
`server.vllm_front`, the others go on as they were.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from steering.vllm.attachment import ASKED, KEY
from steering.vllm.plugin import register as register_workers


def register() -> None:
    """Put Setpoint into this process's vLLM, whichever of its processes this is."""
    register_workers(_register_front)


def _register_front() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    if not hasattr(AsyncLLM.generate, "__wrapped__"):
        AsyncLLM.generate = _watched(AsyncLLM.generate)


def _watched(generate: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `AsyncLLM.generate`, which steers who asks for it."""

    async def watched(llm: Any, prompt: Any, sampling_params: Any, *rest: Any, **more: Any) -> AsyncIterator[Any]:
        args = getattr(sampling_params, "extra_args", None) or {}
        run = generate
        if ASKED in args or KEY in args:
            from functools import partial

            from server.vllm_front import steered

            run = partial(steered, generate)
        async for output in run(llm, prompt, sampling_params, *rest, **more):
            yield output

    watched.__wrapped__ = generate  # type: ignore[attr-defined]
    return watched
