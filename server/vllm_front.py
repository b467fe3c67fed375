"""`vllm serve` alone: steering in `vllm_xargs`, receipts in the response.

    {"model": …, "messages": […], "vllm_xargs": {"steering": "<JSON of API.md's steering object>"}}
    → the response's kv_transfer_params["setpoint"]: the receipt, or one for each of `n` choices

Steering is validated and compiled before vLLM sees the request (`server.vllm_plugin` calls `steered`), and measurements
are taken when it ends. Concepts and presets are those of the store SETPOINT_STORE; no server default. The
model is loaded once beside vLLM's, on the CPU, for its fingerprint and shapes, and its weights are dropped again.

Whoever asks for a stream gets no receipt, for vLLM's chunks have no place for it: `setpoint serve --engine vllm` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

from pydantic import BaseModel, ValidationError

from server.host import load_plant, open_store
from server.presets import Presets
from server.schema.errors import ApiError, from_steering, from_validation
from server.schema.steering import Composition, Part, SteeringSpec
from server.settings import default_store
from steering import Diverged, Plant, Program, Shelf, SpecError, SteeringError
from steering.vllm.account import Accounts, Settled
from steering.vllm.attachment import ASKED, KEY, Attachment, choice_name
from steering.vllm.handshake import Handshake

STORE_VARIABLE = "SETPOINT_STORE"
"""Environment variable: the store that names are looked up in."""
EVERY = 64
"""Outputs of a stream after which its measurements are checked: one that diverges ends within so many tokens."""
SECONDS = 0.5
"""Between two times that what was measured is taken while steered requests run: whoever asks for no stream is heard of
at its end alone, and workers have no room for so much."""


async def steered(generate: Callable[..., Any], llm: Any, prompt: Any, params: Any, *rest: Any, **more: Any) -> Any:
    """`generate` of a request that asks for steering."""
    if (front := getattr(llm, "_setpoint_front", None)) is None:
        front = llm._setpoint_front = Front(llm)
    call = None
    try:
        call = await front.open(prompt, params)
        async with aclosing(generate(llm, prompt, call.params, *rest, **more)) as outputs:
            async for output in outputs:
                yield await call.account(output)
    except (SteeringError, ApiError) as error:
        raise _refused(error) from error
    finally:
        if call is not None:
            call.close()


def _refused(error: SteeringError | ApiError) -> Exception:
    """An error of ours as vLLM's server words it: a 400 that names the field, or its own 500."""
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    found = error if isinstance(error, ApiError) else from_steering(error)
    if found.status >= 500:
        return RuntimeError(found.message)
    if found.param is not None:
        return VLLMValidationError(found.message, parameter=found.param)
    return VLLMClientError(found.message)


class Front:
    """What one vLLM server needs to steer: its workers' answer to the handshake, the model's shapes, the store."""

    def __init__(self, llm: Any) -> None:
        self.accounts = Accounts()
        self._llm = llm
        self._lock = asyncio.Lock()
        self._ready: tuple[Handshake, Plant, Shelf, Presets] | None = None
        self._taking: asyncio.Task[None] | None = None

    async def open(self, prompt: Any, params: Any) -> Call:
        """Begin a steered request. Raises SteeringError or ApiError that names the field."""
        if KEY in params.extra_args:  # programs are made here, of what was validated
            raise SpecError(KEY, expected="no such field")
        if not isinstance(prompt, dict) or not prompt.get("prompt_token_ids") or prompt.get("type") != "token":
            raise SpecError(ASKED, expected="null for a prompt that is not plain text")
        spec = _parsed(params.extra_args[ASKED])
        handshake, plant, shelf, presets = await self._prepared()
        composition, program = await asyncio.to_thread(_compiled, spec, shelf, presets)
        n_prompt = len(prompt["prompt_token_ids"])
        limit = params.max_tokens or self._llm.model_config.max_model_len - n_prompt
        composition.check_scopes(program, n_prompt, limit - 1)
        if program.guard.max_kl is not None:
            raise SpecError("steering.guard.max_kl", expected="null: this engine runs no unsteered twin")
        handshake.check(program)
        check_widths(program, plant)
        call = Call(self, program, params, n_prompt)
        if program.acts:
            self.keep_taking()
        return call

    async def _prepared(self) -> tuple[Handshake, Plant, Shelf, Presets]:
        async with self._lock:
            if self._ready is None:
                answers = await self._answers()
                plant, shelf, presets = await asyncio.to_thread(self._loaded)
                handshake = Handshake.shake(lambda _: answers, plant.width, plant.depth)
                self._ready = handshake, plant, shelf, presets
        return self._ready

    async def _answers(self) -> list[Any]:
        try:
            answers: list[Any] = await self._llm.collective_rpc("setpoint_hello")
        except Exception as error:
            raise SteeringError(
                "vLLM's workers do not have Setpoint in them: install setpoint in their environment, and do not leave "
                f"it out of VLLM_PLUGINS ({type(error).__name__})."
            ) from error
        return answers

    def _loaded(self) -> tuple[Plant, Shelf, Presets]:
        """The plant of vLLM's model, without its weights: what names and shapes need; and the store's names."""
        store = open_store(os.environ.get(STORE_VARIABLE) or default_store())
        plant = load_plant(self._llm.model_config.model, "cpu")
        about = {"model": plant.fingerprint, "depth": plant.depth, "width": plant.width, "caution": plant.caution}
        plant.model.to("meta")
        return plant, Shelf(store, **about), Presets(store.place)

    def keep_taking(self) -> None:
        """Take what was measured now and then, as long as somebody is steered."""
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take_often())

    async def _take_often(self) -> None:
        while self.accounts:
            await asyncio.sleep(SECONDS)
            with suppress(Exception):  # of vLLM's, whose requests are told by vLLM
                await self.take()

    async def take(self) -> None:
        """Take what was measured so far. One after another: who waits finds what the one before took for all."""
        async with self._lock:
            parcels = await self._llm.collective_rpc("setpoint_take")
            self.accounts.file(parcels[0])


class Call:
    """One steered request of vLLM's server, with one account for each of its choices."""

    def __init__(self, front: Front, program: Program, params: Any, n_prompt: int) -> None:
        self._front = front
        self._program = program
        self._n_prompt = n_prompt
        name, choices = uuid.uuid4().hex, params.n
        self._names = [name] if choices == 1 else [choice_name(name, i) for i in range(choices)]
        self._lengths = [0] * choices
        self._n_outputs = 0
        args = {key: value for key, value in params.extra_args.items() if key != ASKED}
        if program.acts:
            args[KEY] = Attachment.of(name, program, n_prompt, choices).to_args()
        self.params = params.clone()
        self.params.extra_args = args
        self._tallies = [front.accounts.open(one, program, n_prompt) for one in self._names]

    async def account(self, output: Any) -> Any:
        """vLLM's output, with the receipt if it is the last one. Raises SteeringError if it was not steered rightly."""
        from vllm.sampling_params import RequestOutputKind

        for one in output.outputs:
            before = self._lengths[one.index] if self.params.output_kind is RequestOutputKind.DELTA else 0
            self._lengths[one.index] = before + len(one.token_ids)
        self._n_outputs += 1
        if self._program.acts and (output.finished or self._n_outputs % EVERY == 0):
            await self._front.take()
            for name, length in zip(self._names, self._lengths, strict=True):
                if length:
                    _check(self._front.accounts.settle(name, self._n_prompt + length - 1))
        if output.finished:
            receipts = [tally.receipt().to_json() for tally in self._tallies]
            found = receipts[0] if len(receipts) == 1 else receipts
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: found}
        return output

    def close(self) -> None:
        """End it, whichever way it ended."""
        for name in self._names:
            self._front.accounts.close(name)


def _compiled(spec: SteeringSpec, shelf: Shelf, presets: Presets) -> tuple[Composition, Program]:
    """What a steering object asks for, read from the store: not on the event loop's thread."""
    if spec.trace != "none":
        raise SpecError("steering.trace", expected="none: vLLM's responses have no place for traces")
    parts = [Part(spec)]
    if spec.preset is not None:
        saved = Part.of_saved(presets.asked(spec.preset), "steering.preset", f"preset {spec.preset!r}")
        parts.insert(0, saved)
    composition = Composition(tuple(parts))
    return composition, composition.program(shelf)


def _check(settled: Settled) -> None:
    if settled.is_lost:
        raise Diverged(
            "The control drove the state out of the range of its number format: lower the setpoint or the strength, or "
            "set guard.max_effort.",
            param="steering",
        )
    if settled.error is not None:
        raise SteeringError(settled.error)


class Body(BaseModel):
    """Where the steering object of a request stands."""

    steering: SteeringSpec


def _parsed(text: object) -> SteeringSpec:
    """The steering object of a request. Raises SpecError or ApiError that names the field."""
    try:
        data = {ASKED: json.loads(text if isinstance(text, str) else "")}
    except json.JSONDecodeError as error:
        raise SpecError(ASKED, expected="a string with the JSON of a steering object", got=text) from error
    try:
        return Body.model_validate(data).steering
    except ValidationError as error:
        raise from_validation(error.errors(include_input=False), data) from error


def check_widths(program: Program, plant: Plant) -> None:
    """Raises SpecError for laws that do not fit the model."""
    for route, law in program.laws.items():
        widths = (plant.width_of(route.read), plant.width_of(route.write))
        if law.widths != widths:
            raise SpecError(ASKED, expected=f"widths {widths} on {route}, the model's", got=law.widths)
