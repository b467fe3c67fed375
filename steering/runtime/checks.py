"""What a request must be for an engine to take it, as far as only the engine can know; the names of its failures."""

from __future__ import annotations

from typing import Any

import torch

from steering.errors import DimensionMismatch, Diverged, PlantError, SpecError, SteeringError
from steering.plant.plant import Plant
from steering.program import Program
from steering.runtime.blocks import Blocks
from steering.runtime.request import Request


def check(
    request: Request, plant: Plant, max_model_len: int, max_batch: int, blocks: Blocks[Any] | None = None
) -> None:
    """Lengths, token ids, sites and widths. `blocks` are those of an engine that can run twins.

    Raises PlantError if it is longer than a sequence may be or its program asks for a site that the model does not
    have, DimensionMismatch for laws of other widths, SpecError for token ids out of the vocabulary and for a twin that
    there is no room for.
    """
    n_prompt, sampling = len(request.prompt), request.sampling
    if n_prompt + sampling.max_tokens > max_model_len:
        raise PlantError(
            f"The prompt has {n_prompt} tokens and max_tokens is {sampling.max_tokens}: expected at most "
            f"{max_model_len} together; shorten one of them.",
            param="prompt" if n_prompt >= max_model_len else "max_tokens",
        )
    ids = {"prompt": request.prompt, "stop_token_ids": sampling.stop_token_ids, "logit_bias": sampling.logit_bias}
    for name, tokens in ids.items():
        if any(not 0 <= token < plant.vocab for token in tokens):
            raise SpecError(name, expected=f"token ids from 0 to {plant.vocab - 1}")
    if request.program.acts:
        _check_program(request.program, plant)
    if n_rows(request) > 1:
        _check_twin(request, max_batch, blocks)


def n_rows(request: Request) -> int:
    """Sequences that a request runs: two where an unsteered twin bounds its distribution."""
    return 2 if request.program.acts and request.program.guard.max_kl is not None else 1


def _check_program(program: Program, plant: Plant) -> None:
    for route, law in program.laws.items():
        widths = (plant.width_of(route.read), plant.width_of(route.write))
        if law.widths != widths:
            raise DimensionMismatch(f"The law on {route} has widths {law.widths}: expected {widths}, the model's.")


def _check_twin(request: Request, max_batch: int, blocks: Blocks[Any] | None) -> None:
    """A twin needs a place, and keys and values, of its own."""
    if blocks is None:
        raise SpecError("guard.max_kl", expected="null, since this engine runs no unsteered twin beside a request")
    if max_batch < 2:
        raise SpecError("guard.max_kl", expected="an engine with max_batch >= 2, for the unsteered twin")
    positions = len(request.prompt) + request.sampling.max_tokens
    if 2 * blocks.needed(positions) > len(blocks):
        raise SpecError(
            "guard.max_kl",
            expected=f"at most {len(blocks) // 2 * blocks.size} positions, since the unsteered twin needs as many",
            got=positions,
            advice="shorten the prompt or max_tokens, or start the server with more kv_tokens",
        )


def diverged(request: Request) -> Diverged | SteeringError:
    """The error of a request whose state is no longer finite."""
    if not request.program.acts:
        return SteeringError("The model produced numbers that are not finite for this prompt.")
    return Diverged(
        "The control drove the state out of the range of its number format: lower the setpoint or the strength, or set "
        "guard.max_effort.",
        param="steering",
    )


def failed(error: Exception) -> SteeringError:
    """The error of a request whose computation raised."""
    if isinstance(error, SteeringError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return SteeringError("This request ran out of memory: send a shorter prompt.")
    return SteeringError(f"The computation of this request failed ({type(error).__name__}).")
