"""The loaded model with its engine and its concepts, and whether it may be used: loading, ready or draining."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from server.generation import Generation
from server.jobs import Jobs
from server.metrics import Metrics
from server.presets import Presets
from server.schema.errors import ApiError
from server.settings import ServerSettings
from server.tokens import TokenTable
from steering import (
    AnyEngine,
    Artifact,
    ArtifactCorrupt,
    ArtifactNotFound,
    Engine,
    EngineSettings,
    GrammarCompiler,
    Plant,
    Request,
    Sampling,
    Shelf,
    SpecError,
    SteeringError,
    Store,
    VllmEngine,
    VllmSettings,
    echo,
)
from steering.demo import CONCEPTS, MODEL, MODEL_ID
from steering.folder import Health
from steering.formats.gguf import Target

State = Literal["loading", "ready", "draining"]
READERS = 2
"""Captures and traces that run at a time: each is a forward pass with all its states in memory, and a thread."""


def open_store(where: Path | str) -> Store:
    """The store in a folder or at a URL, over the concepts that ship with the embedded model. Raises SpecError."""
    return Store(where, builtin=CONCEPTS)


def load_plant(
    model: str | None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    tensor_parallel: int = 1,
) -> Plant:
    """The model of a folder or hub id, the embedded one for None. `auto` takes a GPU where there is one.

    Raises PlantError.
    """
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    given: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "tensor_parallel": tensor_parallel}
    return Plant.load(model or MODEL, device=where, **given)


def start_vllm(settings: ServerSettings, sizes: dict[str, Any]) -> tuple[Plant, VllmEngine]:
    """The vLLM engine, and the plant beside it: on the CPU unless `device` says otherwise, and never quantised, so that
    what is fitted there is fitted on the checkpoint. Raises SteeringError."""
    VllmEngine.require()
    chosen = VllmSettings(
        **sizes,
        model_impl=settings.model_impl,
        tensor_parallel=settings.tensor_parallel,
        quantization=settings.quantization,
    )
    device = "cpu" if settings.device == "auto" else settings.device
    plant = load_plant(settings.model, device, settings.dtype)
    return plant, VllmEngine(plant, chosen)


def served_name(model: str | None) -> str:
    """The id under which a model is served: `setpoint-demo`, or the last part of its path or hub id."""
    return (
        MODEL_ID if model is None else Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    )


@contextmanager
def reading(store: Store, name: str) -> Iterator[Path]:
    """The file of an artifact, to be read in the block. Raises ArtifactNotFound, also for an impossible name and for a
    file that is deleted meanwhile."""
    absent = ArtifactNotFound(f"There is no artifact named {echo(name)}.", param="name")
    try:
        path = store.path(name)
    except SpecError as error:
        raise absent from error
    try:
        yield path
    except (FileNotFoundError, ArtifactCorrupt) as error:
        if path.is_file():
            raise
        raise absent from error


def describe(store: Store, name: str) -> dict[str, Any]:
    """What there is to say about one artifact of `store`. Raises ArtifactNotFound, ArtifactCorrupt."""
    with reading(store, name) as path:
        found, size = Artifact.load(path), path.stat().st_size
    quality = found.body.get("quality")
    return {
        **found.body,  # first: what a file says of itself cannot stand for what it is
        "quality": quality if isinstance(quality, dict) else {},
        "name": name,
        "kind": found.kind,
        "fingerprint": found.fingerprint,
        "model": found.model,
        "created": found.created,
        "builtin": path.parent == store.builtin,
        "bytes": size,
        "tensors": {
            key: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for key, tensor in sorted(found.tensors.items())
        },
    }


@dataclass(eq=False)
class Host:
    """One model, ready to generate."""

    plant: Plant
    engine: AnyEngine
    store: Store
    model_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, settings: ServerSettings) -> Host:
        """Load the model, start its engine and run one token through it. Raises SteeringError."""
        store = open_store(settings.store_place)
        store.place.look("default.json")  # whether it can be reached: before minutes of loading
        name = settings.served_model_name or served_name(settings.model)
        sizes = {
            "max_batch": settings.max_batch,
            "max_model_len": settings.max_model_len,
            "kv_tokens": settings.kv_tokens,
            "prefix_cache": settings.prefix_cache,
            "compile": settings.compile,
            "queue_limit": settings.queue_limit,
        }
        engine: AnyEngine
        if settings.engine == "vllm":
            plant, engine = start_vllm(settings, sizes)
        else:
            how = settings.device, settings.dtype, settings.quantization, settings.tensor_parallel
            plant = load_plant(settings.model, *how)
            engine = Engine(plant, EngineSettings(**sizes))
        _ = plant.massive  # looked for now: no request waits for it
        engine.generate([Request("warm-up", (0,), Sampling(max_tokens=1))])
        engine.start()
        return cls(plant, engine, store, name)

    @property
    def context(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.engine.max_model_len

    @property
    def has_chat(self) -> bool:
        """Whether the model takes messages."""
        return bool(self.plant.tokenizer.chat_template)

    @cached_property
    def shelf(self) -> Shelf:
        """The concepts of this model."""
        plant = self.plant
        return Shelf(self.store, model=plant.fingerprint, depth=plant.depth, width=plant.width, caution=plant.caution)

    def describe(self, name: str) -> dict[str, Any]:
        """One artifact, verified, without its numbers. Raises ArtifactNotFound, also for an impossible name, and
        ArtifactCorrupt."""
        return describe(self.store, name)

    def preset_of(self, model: str | None) -> str | None:
        """The preset that a model's id names, `PRESET` of `MODEL:PRESET`; None for the served model itself."""
        prefix = f"{self.model_id}:"
        return model.removeprefix(prefix) if model is not None and model.startswith(prefix) else None

    def require_model(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name` is the served model's id, alone or with a preset of it; absent means it."""
        if name is None or name == self.model_id:
            return
        preset = self.preset_of(name)
        if preset is not None and self.presets.exists(preset):
            return
        known = f"this server has {self.model_id!r}" if preset is None else f"there is no preset {echo(preset)}"
        raise ApiError(404, f"The model {echo(name)} does not exist; {known}.", param="model", code="model_not_found")

    @cached_property
    def presets(self) -> Presets:
        """The saved steering objects."""
        return Presets(self.store.place)

    @cached_property
    def target(self) -> Target:
        """This model, as control vectors are imported for it."""
        return Target.of(self.plant)

    def is_usable(self, model: str) -> bool:
        """Whether an artifact fitted on `model`, a fingerprint, is one of this model's."""
        return model == self.plant.fingerprint

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Grammars over this model's tokens."""
        return GrammarCompiler(self.plant)

    @cached_property
    def tokens(self) -> TokenTable:
        """Text and bytes of single tokens."""
        return TokenTable(self.plant.tokenizer)

    @property
    def places(self) -> int:
        """Requests that the engine holds at most, running and waiting."""
        return self.engine.settings.max_batch + self.engine.settings.queue_limit

    def check_tokens(self, tokens: list[int], param: str) -> list[int]:
        """`tokens`, which must be of the vocabulary. Raises SpecError that names `param`."""
        for token in tokens:
            if not 0 <= token < self.plant.vocab:
                raise SpecError(param, expected=f"token ids from 0 to {self.plant.vocab - 1}", got=token)
        return tokens


class Service:
    """What the application holds: the host once it is loaded, the generations in progress, and the jobs."""

    def __init__(self, settings: ServerSettings, host: Host | None = None) -> None:
        self.settings = settings
        self.host = host
        self.is_draining = False
        self.metrics = Metrics(lambda: None if self.host is None else self.host.engine)
        self.jobs = Jobs()
        self.metrics.watch_jobs(self.jobs)
        self.metrics.watch_readiness(lambda: self.state == "ready")
        self.metrics.watch_store(lambda: Health() if self.host is None else self.host.store.place.health)
        self.readers = asyncio.Semaphore(READERS)
        self._running: set[Generation] = set()

    @property
    def state(self) -> State:
        """Whether requests are served now."""
        return "draining" if self.is_draining else "loading" if self.host is None else "ready"

    def ready_host(self) -> Host:
        """The host. Raises ApiError 503 while loading and while draining."""
        if self.host is None or self.is_draining:
            raise ApiError(
                503, f"The server is {self.state}; try again later.", code=self.state, headers={"Retry-After": "1"}
            )
        return self.host

    def generate(self, requests: list[Request]) -> Generation:
        """Submit requests that belong together. Raises what `Engine.submit` raises; then none of them runs."""
        generation = Generation(self.ready_host().engine, requests, self._running.discard, self.metrics)
        self._running.add(generation)
        generation.start()
        return generation

    def runs_with(self, artifact: str) -> bool:
        """Whether a running request is steered by an artifact. For the event loop's thread."""
        programs = [request.program for generation in self._running for request in generation.running]
        terms = [term for program in programs for term in program.terms]
        return any(term.label == artifact or (term.gate and term.gate.when.concept == artifact) for term in terms)

    async def load(self) -> None:
        """Load the host in a thread. Raises SteeringError."""
        if self.host is None:
            self.host = await asyncio.to_thread(self._load)
            self.when_lost(lambda error: setattr(self, "is_draining", True))

    def when_lost(self, call: Callable[[SteeringError], None]) -> None:
        """Call with the reason, from another thread, when the processes that share the model are no longer together."""
        if self.host is None:
            return
        if isinstance(self.host.engine, VllmEngine):
            self.host.engine.on_loss(call)
        elif (crew := self.host.plant.crew) is not None:
            crew.on_loss(call)

    def _load(self) -> Host:
        self.sweep()
        return Host.load(self.settings)

    def sweep(self) -> None:
        """Take the halves of files that a killed process left out of the store."""
        if swept := open_store(self.settings.store_place).sweep():
            logging.getLogger("setpoint").warning("swept", extra={"fields": {"files": len(swept)}})

    async def drain(self, wait: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, cancel the jobs, let requests that run finish within `drain_seconds`, abort the rest.

        `wait() == True` cuts the waiting short.
        """
        self.is_draining = True
        self.jobs.cancel_all()
        deadline = time.monotonic() + self.settings.drain_seconds
        while self._running and time.monotonic() < deadline and not wait():
            await asyncio.sleep(0.02)
        for generation in tuple(self._running):
            generation.abort()
        grace = time.monotonic() + 2.0
        while self._running and time.monotonic() < grace:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stop the jobs and the engine."""
        self.is_draining = True
        await asyncio.to_thread(self.jobs.close)
        if self.host is not None:
            await asyncio.to_thread(self.host.engine.stop, 0.0)
            await asyncio.to_thread(self.host.plant.close)
