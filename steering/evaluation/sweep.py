"""A dose–response curve: one intervention at a grid of doses, through an engine that others use at the same time.

For each dose λ, on the same prompts and seeds

    effect            the rate at which a judge finds the concept in the answer, with its 95% interval; without a judge
                      the mean of the measured projections
    perplexity ratio  perplexity of the answers under the unsteered model ÷ that of the unsteered answers
    effort            mean and max of ‖u_l‖/‖x_l‖,     tracking: mean projection and its distance from the setpoint

as the receipts measured them. A few requests run at a time, and only one of them waits where no place is free.
Source: the tables of `steering.evaluation.suite`, one row of it over many strengths.
Oracle: `Engine.generate` on the same requests, and `metrics.perplexity` of its answers.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from steering.demo.judges import Judge
from steering.errors import QueueFull, SpecError, SteeringError
from steering.evaluation.conditions import meters
from steering.evaluation.metrics import perplexity, wilson
from steering.fit import Example
from steering.methods.guards import guarded
from steering.plant.plant import Plant
from steering.program import Program, Scope
from steering.registry import REGISTRY, Bench, Intervention
from steering.runtime import AnyEngine, Finished, Request, Sampling
from steering.runtime.request import Event

Progress = Callable[[str, float], None]
SHARE = 4
"""One in so many of the engine's places is what a sweep takes at most."""
SCORED = 4
"""Answers whose perplexity is computed at a time: few, so that whoever generates waits little for it."""
POLL_SECONDS = 0.05
"""How often `pause` is called, and a full queue asked again, while answers are awaited."""
SAMPLES = 2
"""Answers that are kept for each dose."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is run. `judge` says whether an answer to a prompt carries the concept; None measures projections alone."""

    concept: str
    grid: tuple[float, ...]
    prompts: tuple[Example, ...]
    type: str = "lqr"
    apply: Scope = Scope()
    max_tokens: int = 64
    temperature: float = 0.8
    seed: int = 0
    """Prompt i is answered from seed + i, at every dose."""
    judge: Judge | None = None

    @property
    def swept(self) -> str:
        """The field that takes the doses. Raises SpecError for a type that does not exist or steers no concept."""
        method = REGISTRY.get(self.type)
        names = [field.name for field in fields(method)] if method else []
        if "concept" not in names:
            known = [name for name, one in REGISTRY.items() if "concept" in {field.name for field in fields(one)}]
            raise SpecError("type", expected=f"one of {', '.join(known)}", got=self.type)
        return "setpoint" if "setpoint" in names else "strength"

    def programs(self, bench: Bench) -> list[Program]:
        """One program a dose; a dose that leaves the model alone is measured by meters.

        Raises SteeringError that names `type`, `concept`, `apply` or `grid[i]`.
        """
        swept = self.swept
        found = []
        for index, dose in enumerate(self.grid):
            try:
                given = {"concept": self.concept, "apply": self.apply, swept: dose}
                term = cast(Intervention, REGISTRY[self.type](**given)).compile(bench)
                term = guarded(term, bench)
                # What a turn met is an angle: the projection is measured beside it.
                program = Program((term,) if term.units != "degrees" else (*self.metered(bench).terms, term))
            except SteeringError as error:
                error.param = {"concept": "concept", "name": "concept"}.get(error.param or "", f"grid[{index}]")
                raise
            except TypeError as error:
                raise SpecError("type", expected="one that a concept and a dose describe", got=self.type) from error
            found.append(program if program.acts else self.metered(bench))
        return found

    def metered(self, bench: Bench) -> Program:
        """The unsteered model, measured. Raises SpecError for an unknown concept or a scope that selects nothing."""
        program = Program((meters(bench.concept(self.concept), self.apply),))
        if not program.acts:
            raise SpecError("apply", expected="a token to act on")
        return program

    def encoded(self, plant: Plant, room: int) -> list[tuple[int, ...]]:
        """Token ids of the prompts. Raises SteeringError that names the prompt, also where one leaves no `room`."""
        found = []
        for index, prompt in enumerate(self.prompts):
            where = f"prompts[{index}]"
            try:
                ids = tuple(plant.encode(prompt, open_end=not isinstance(prompt, str)))
            except SteeringError as error:
                error.param = where
                raise
            if len(ids) + self.max_tokens > room:
                most = max(room - self.max_tokens, 0)
                raise SpecError(
                    where, expected=f"at most {most} tokens beside {self.max_tokens} to generate", got=len(ids)
                )
            found.append(ids)
        return found


def run_sweep(
    plant: Plant,
    bench: Bench,
    engine: AnyEngine,
    sweep: Sweep,
    progress: Progress | None = None,
    pause: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The figures of the unsteered model and of every dose, as JSON data without NaN (null).

    `engine` has to be started. What `progress` or `pause` raises ends the sweep and its requests. Raises SteeringError
    for a sweep that `programs` or `encoded` refuses, or whose unsteered answers all failed.
    """
    pause = pause or (lambda: None)
    prompts = sweep.encoded(plant, engine.max_model_len)
    doses: list[tuple[float | None, Program]] = [(None, sweep.metered(bench))]
    doses += zip(sweep.grid, sweep.programs(bench), strict=True)
    cells: list[dict[str, Any]] = []
    base = math.nan
    for index, (dose, program) in enumerate(doses):
        if progress:
            name = "unsteered" if dose is None else f"{sweep.swept} {dose:g}"
            progress(name, index / len(doses))
        requests = [
            Request(
                f"sweep-{uuid.uuid4().hex}",
                ids,
                Sampling(max_tokens=sweep.max_tokens, temperature=sweep.temperature, seed=sweep.seed + i),
                program,
            )
            for i, ids in enumerate(prompts)
        ]
        ends = generate_few(engine, requests, max(1, engine.settings.max_batch // SHARE), pause)
        if dose is None and all(map(_failed, ends)):
            raise ends[0].error or SteeringError("The unsteered answers failed.")
        scored = [(ids, end.tokens) for ids, end in zip(prompts, ends, strict=True) if not _failed(end)]
        measured = perplexity(plant, scored, batch=SCORED, pause=pause)
        base = measured if dose is None else base
        cells.append(_cell(sweep, dose, ends, measured, measured / base))
    if progress:
        progress("done", 1.0)
    return {
        "concept": sweep.concept,
        "type": sweep.type,
        "swept": sweep.swept,
        "prompts": len(prompts),
        "max_tokens": sweep.max_tokens,
        "temperature": sweep.temperature,
        "seed": sweep.seed,
        "unsteered": cells[0],
        "grid": cells[1:],
    }


def generate_few(
    engine: AnyEngine, requests: Sequence[Request], width: int, pause: Callable[[], None]
) -> list[Finished]:
    """Run requests on a started engine, at most `width` at a time, to their ends and in the order given.

    Where no place is free one is asked for at a time. What `pause` raises aborts those that run. Raises QueueFull when
    the engine shuts down.
    """
    waiting = deque(requests)
    done: dict[str, Finished] = {}
    running: set[str] = set()
    arrived = threading.Condition()

    def deliver(event: Event) -> None:
        if isinstance(event, Finished):
            with arrived:
                done[event.request_id] = event
                running.discard(event.request_id)
                arrived.notify_all()

    try:
        while waiting or running:
            pause()
            seen = len(done)
            while waiting and (not running or (len(running) < width and _has_room(engine))):
                running.add(waiting[0].id)
                try:
                    engine.submit(waiting[0], deliver)
                except BaseException as error:
                    running.discard(waiting[0].id)
                    if engine.is_closing or not isinstance(error, QueueFull):
                        raise
                    break
                waiting.popleft()
            with arrived:
                if len(done) == seen:
                    arrived.wait(POLL_SECONDS)
    except BaseException:
        with arrived:
            left = tuple(running)
        for id_ in left:
            engine.abort(id_)
        raise
    return [done[request.id] for request in requests]


def _has_room(engine: AnyEngine) -> bool:
    """Whether another request would run at once."""
    stats = engine.stats()
    return stats.running + stats.waiting < engine.settings.max_batch


def _cell(sweep: Sweep, dose: float | None, ends: Sequence[Finished], measured: float, ratio: float) -> dict[str, Any]:
    """The figures of one dose over the answers that did not fail, with their perplexity and its ratio."""
    good = [(i, end) for i, end in enumerate(ends) if not _failed(end)]
    receipts = [end.receipt for _, end in good if end.receipt is not None]
    trackings = [next(iter(receipt.tracking.values())) for receipt in receipts if receipt.tracking]
    projection = _mean([tracking.mean for tracking in trackings])
    effect: dict[str, Any]
    if sweep.judge is None:
        effect = {"measure": "projection", "mean": _number(projection)}
    else:
        hits = sum(bool(sweep.judge(end.text, sweep.prompts[i])) for i, end in good)
        rate = hits / len(good) if good else math.nan
        effect = {"measure": "judge", "rate": _number(rate), "interval": list(map(_number, wilson(hits, len(good))))}
    return {
        "dose": dose,
        "n": len(good),
        "failed": len(ends) - len(good),
        "effect": effect,
        "perplexity": _number(measured),
        "perplexity_ratio": _number(ratio),
        "effort": {
            "mean": _number(_mean([receipt.effort["mean"] for receipt in receipts])),
            "max": _number(max((receipt.effort["max"] for receipt in receipts), default=math.nan)),
        },
        "tracking": {
            "mean": _number(projection),
            "error": _number(_mean([tracking.error for tracking in trackings])),
        },
        "samples": [end.text for _, end in good[:SAMPLES]],
    }


def _failed(end: Finished) -> bool:
    return end.reason in ("error", "abort")


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _number(value: float) -> float | None:
    """Five significant digits; null for what JSON cannot carry."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
