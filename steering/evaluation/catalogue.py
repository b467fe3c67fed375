"""Every intervention of the catalogue at three strengths, with its control: what it does, what it costs.

    task      raise    neutral prompts; effect = answers that carry the concept
              lower    prompts that push the concept; effect = answers that do not carry it
              keep     neutral prompts, nothing is wanted; effect = tokens equal to the unsteered answer's, greedy
    cost      tokens per second of a full batch, steered ÷ unsteered, median of interleaved runs

The control does the same with something that knows nothing of the concept: random directions with the same gains,
random units, components, features, heads or layers of the same number, trained matrices drawn anew with their norms.
Strengths are those at which the method is of interest on the embedded model, least first: nothing here is tuned.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steering.concept import Concept
from steering.demo.contrast import opposite, prompts
from steering.demo.judges import JUDGES
from steering.errors import SpecError
from steering.evaluation.entries import ENTRIES, Entry, Task
from steering.evaluation.metrics import distinct, perplexity, wilson
from steering.evaluation.speed import rate
from steering.plan import Plan
from steering.plant.capture import capture_means, state_sites
from steering.plant.plant import Plant
from steering.program import Program
from steering.registry import Bench
from steering.runtime import Engine, Finished, Request, Sampling

Progress = Callable[[str, float], None]
COST_RUNS = 3
"""Interleaved pairs of runs of which the cost is the median."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What is run. Raises SpecError for a method that the table lacks and for sizes below 1."""

    methods: tuple[str, ...] = ()
    """Names of `ENTRIES`; all when empty."""
    n_prompts: int = 48
    max_tokens: int = 48
    temperature: float = 0.8
    seed: int = 0
    batch: int = 16
    """Requests of a run that is timed."""

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in {entry.name for entry in ENTRIES}:
                raise SpecError("methods", expected=f"of {', '.join(entry.name for entry in ENTRIES)}", got=name)
        for name in ("n_prompts", "max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise SpecError(name, expected="a number >= 1", got=getattr(self, name))

    @property
    def entries(self) -> list[Entry]:
        """The rows that are measured."""
        return [entry for entry in ENTRIES if not self.methods or entry.name in self.methods]


@dataclass(frozen=True)
class Row:
    """One method at one strength, or its control, or the unsteered model (method `none`, one row a task)."""

    method: str
    type: str
    task: Task
    concept: str
    strength: float | None
    knob: str
    is_control: bool
    n: int
    effect: float
    interval: tuple[float, float]
    perplexity_ratio: float
    distinct_2: float
    effort: float
    speed: float
    failed: int


@dataclass
class _Asked:
    """The prompts of one task and what the unsteered model makes of them."""

    chats: Sequence[Any]
    ids: list[tuple[int, ...]]
    plain: list[Finished]
    perplexity: float
    random: Bench


def run_catalogue(
    plant: Plant, bench: Bench, engine: Engine, catalogue: Catalogue, progress: Progress | None = None
) -> list[Row]:
    """Every row of the table, the unsteered model's first. Raises what compiling a method raises."""
    rows: list[Row] = []
    asked: dict[tuple[Task, str], _Asked] = {}
    for done, entry in enumerate(catalogue.entries):
        key = (entry.task, entry.concept)
        if key not in asked:
            asked[key] = _ask(plant, bench, engine, catalogue, *key)
            rows.append(_row(plant, engine, catalogue, asked[key], entry, None, asked[key].plain, False))
        for n, strength in enumerate(entry.strengths):
            for is_control in (False, True):
                if progress:
                    part = (2 * n + is_control) / (2 * len(entry.strengths))
                    progress(entry.name, (done + part) / len(catalogue.entries))
                program = entry.program(
                    strength, bench if not is_control or entry.has_control else asked[key].random, is_control
                )
                results = _generate(engine, catalogue, entry.task, asked[key].ids, program)
                rows.append(_row(plant, engine, catalogue, asked[key], entry, strength, results, is_control, program))
    if progress:
        progress("done", 1.0)
    return rows


def _ask(plant: Plant, bench: Bench, engine: Engine, catalogue: Catalogue, task: Task, concept: str) -> _Asked:
    if task == "lower":
        chats = prompts(str(opposite(concept)), "opposed", "test", catalogue.n_prompts)
    else:
        chats = prompts(concept, "neutral", "test", catalogue.n_prompts)
    ids = [tuple(plant.encode(chat, open_end=True)) for chat in chats]
    plain = _generate(engine, catalogue, task, ids, Program())
    measured = perplexity(plant, [(i, done.tokens) for i, done in zip(ids, plain, strict=True)])
    means = capture_means(plant, ids, state_sites(plant), "last")
    mean_LD = torch.stack([means[site].mean(0) for site in state_sites(plant)])
    return _Asked(chats, ids, plain, measured, RandomBench(bench, mean_LD, catalogue.seed))


def _generate(
    engine: Engine, catalogue: Catalogue, task: Task, ids: Sequence[tuple[int, ...]], program: Program
) -> list[Finished]:
    temperature = 0.0 if task == "keep" else catalogue.temperature
    return engine.generate(
        [
            Request(
                f"{catalogue.seed}-{i}",
                prompt,
                Sampling(max_tokens=catalogue.max_tokens, temperature=temperature, seed=catalogue.seed + i),
                program,
            )
            for i, prompt in enumerate(ids)
        ]
    )


def _row(
    plant: Plant,
    engine: Engine,
    catalogue: Catalogue,
    asked: _Asked,
    entry: Entry,
    strength: float | None,
    results: list[Finished],
    is_control: bool,
    program: Program | None = None,
) -> Row:
    effect, interval = _effect(entry, asked, results)
    measured = perplexity(plant, [(ids, done.tokens) for ids, done in zip(asked.ids, results, strict=True)])
    efforts = [done.receipt.effort["sum_mean"] for done in results if done.receipt is not None]
    return Row(
        method="none" if strength is None else entry.name,
        type="none" if strength is None else entry.type,
        task=entry.task,
        concept=entry.concept,
        strength=strength,
        knob=entry.knob,
        is_control=is_control,
        n=len(results),
        effect=effect,
        interval=interval,
        perplexity_ratio=measured / asked.perplexity,
        distinct_2=distinct([done.text for done in results], 2),
        effort=float(np.mean(efforts)) if efforts else 0.0,
        speed=1.0 if program is None else math.nan if is_control else _speed(engine, catalogue, asked.ids, program),
        failed=sum(done.error is not None for done in results),
    )


def _effect(entry: Entry, asked: _Asked, results: list[Finished]) -> tuple[float, tuple[float, float]]:
    """The effect and its 95% interval; of `keep` the interval is over answers that are equal to the last token."""
    if entry.task == "keep":
        pairs = [(a.tokens, b.tokens) for a, b in zip(asked.plain, results, strict=True)]
        # Over the longer answer: one that ends early has lost what would have followed.
        same = [sum(map(operator.eq, a, b)) / max(len(a), len(b), 1) for a, b in pairs]
        return float(np.mean(same)), wilson(sum(a == b for a, b in pairs), len(pairs))
    judge = JUDGES[entry.concept]
    hits = [bool(judge(done.text, chat)) for done, chat in zip(results, asked.chats, strict=True)]
    n = sum(hits) if entry.task == "raise" else len(hits) - sum(hits)
    return n / len(hits), wilson(n, len(hits))


def _speed(engine: Engine, catalogue: Catalogue, ids: Sequence[tuple[int, ...]], program: Program) -> float:
    """Tokens per second of a batch that generates its full length, steered ÷ unsteered, median of interleaved runs."""
    prompts = [ids[i % len(ids)] for i in range(catalogue.batch)]

    def ratio() -> float:
        plain, steered = (rate(engine, prompts, each, catalogue.max_tokens) for each in ([], [program]))
        return steered / plain

    return median(ratio() for _ in range(COST_RUNS))


class RandomBench:
    """A bench whose concepts and trained plans know nothing: directions drawn at random, sizes and gains as they were.

    `mean_LD` are mean states of the unsteered model: a random direction's origin is put where they lie as far from it,
    in units of the concept, as from the true one's, so that both regulators have the same error to begin with.
    """

    def __init__(self, bench: Bench, mean_LD: Tensor, seed: int) -> None:
        self._bench = bench
        self._mean_LD = mean_LD
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        """Everything that is not drawn."""
        return getattr(self._bench, name)

    def concept(self, name: str) -> Concept:
        """The concept with random unit directions; gains along them, as long as they were."""
        concept = self._bench.concept(name)
        drawn_LD = self._like(concept.direction, name)
        origin_L = concept.origin + ((drawn_LD - concept.direction) * self._mean_LD).sum(-1)
        gains = {kind: gain.norm(dim=-1, keepdim=True) * drawn_LD[: len(gain)] for kind, gain in concept.gains.items()}
        return replace(concept, direction=drawn_LD, origin=origin_L, gains=gains)

    def plan(self, name: str, kind: type[Any]) -> Any:
        """The plan with its matrices drawn anew, row norms as they were; rotations stay rotations."""
        plan: Plan = self._bench.plan(name, kind)
        drawn: Mapping[str, Tensor] = {
            field.name: self._like(value, f"{name} {field.name}")
            for field in fields(plan)
            if isinstance(value := getattr(plan, field.name), Tensor) and field.name != "rotation"
        }
        return replace(plan, **drawn)  # type: ignore[arg-type]

    def _like(self, rows: Tensor, name: str) -> Tensor:
        """Random rows as long as these; of a name always the same, whatever else is measured."""
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(name.encode()))
        noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        return noise / noise.norm(dim=-1, keepdim=True).clamp_min(1e-30) * rows.norm(dim=-1, keepdim=True)


COLUMNS = (
    "method", "task", "knob", "strength", "effect", "95%", "ppl ÷", "distinct-2", "effort", "tok/s ÷",
    "control", "its ppl ÷",
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One row of text for each method and strength, with its control beside it, in the order of `COLUMNS`."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        if row.is_control:
            continue
        own = (row.method, row.task, row.concept, row.strength)
        other = next((r for r in rows if r.is_control and (r.method, r.task, r.concept, r.strength) == own), None)
        found.append(
            (
                row.method,
                f"{row.task} {row.concept}" if row.task != "keep" else "keep",
                "–" if row.strength is None else row.knob,
                "–" if row.strength is None else f"{row.strength:g}",
                f"{row.effect:.2f}",
                f"{row.interval[0]:.2f}–{row.interval[1]:.2f}",
                f"{row.perplexity_ratio:.2f}",
                f"{row.distinct_2:.2f}",
                f"{row.effort:.2f}",
                f"{row.speed:.2f}",
                "–" if other is None else f"{other.effect:.2f}",
                "–" if other is None else f"{other.perplexity_ratio:.2f}",
            )
        )
    return found
