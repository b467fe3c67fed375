"""The entry point of vLLM's plugins: each of vLLM's processes calls `register`, so little is imported here.

`AsyncLLM.generate` is where every request of vLLM's own server passes. One that asks for steering takes the way of
`server.vllm_front`, the others go on as they were. Where vLLM would leave the question behind, its requests say so
themselves: a beam search does not hand on `vllm_xargs`, and fields that vLLM does not know it drops.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial, wraps
from typing import Any

from steering.vllm.attachment import ASKED, KEY
from steering.vllm.plugin import register as register_workers


def register() -> None:
    """Put Setpoint into this process's vLLM, whichever of its processes this is."""
    register_workers(_register_front)


def _register_front() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    if hasattr(AsyncLLM.generate, "__wrapped__"):
        return
    AsyncLLM.generate = _watched(AsyncLLM.generate)
    for asked in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        asked.to_sampling_params = _checked(asked.to_sampling_params)
    for searching in (ChatCompletionRequest, CompletionRequest):
        searching.to_beam_search_params = _checked(searching.to_beam_search_params, is_beam=True)


def _checked(parameters: Callable[..., Any], *, is_beam: bool = False) -> Callable[..., Any]:
    """How vLLM reads a request's parameters, and a 400 for steering that it would not see."""

    @wraps(parameters)
    def checked(request: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        if ASKED in (request.model_extra or {}):
            raise VLLMValidationError(
                "`steering` is no field of vLLM's own server: expected its JSON as a string in vllm_xargs.steering.",
                parameter=ASKED,
            )
        if is_beam and {ASKED, KEY} & set(request.vllm_xargs or {}):
            raise VLLMValidationError(
                "A beam search cannot be steered: expected use_beam_search false beside vllm_xargs.steering.",
                parameter="use_beam_search",
            )
        return parameters(request, *args, **kwargs)

    return checked


def _watched(generate: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `AsyncLLM.generate`, which steers who asks for it."""

    async def watched(llm: Any, prompt: Any, sampling_params: Any, *rest: Any, **more: Any) -> AsyncIterator[Any]:
        args = getattr(sampling_params, "extra_args", None) or {}
        run = generate
        if ASKED in args or KEY in args:
            from server.vllm_front import steered

            run = partial(steered, generate)
        async with aclosing(run(llm, prompt, sampling_params, *rest, **more)) as outputs:  # ends it where we end
            async for output in outputs:
                yield output

    watched.__wrapped__ = generate  # type: ignore[attr-defined]
    return watched
