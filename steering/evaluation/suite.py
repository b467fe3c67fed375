"""The steering-quality suite of the embedded model: choose strengths on one split, report on another.

For every concept, method and kind of prompt (neutral, or opposed: pushing the other way)

    chosen strength   the largest effect on the `tune` prompts among strengths whose perplexity is at most `cap` times
                      the unsteered one there; when none is, the one of least perplexity
    reported          effect, perplexity, distinct-2, fluency, effort and tracking error on the `test` prompts, over
                      seeds

so that no figure is chosen on the prompts it is measured on. The effect is judged exactly (`steering.demo.judges`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from steering.demo.contrast import prompts
from steering.demo.judges import JUDGES, fluency
from steering.errors import SpecError
from steering.evaluation.conditions import METHODS, Condition
from steering.evaluation.metrics import distinct, perplexity, wilson
from steering.plant.plant import Plant
from steering.registry import Bench
from steering.runtime import AnyEngine, Finished, Request, Sampling

Kind = Literal["neutral", "opposed"]
Progress = Callable[[str, float], None]
CAPS: dict[str, float] = {"neutral": 1.15, "opposed": 1.5}
"""Perplexity, relative to the unsteered model's on the same prompts, within which a strength may be chosen."""
TRACKED_FROM = 3
"""First layer of the tracking figures: the inputs of earlier ones have hardly been controlled yet."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is run. Defaults are a table of a few minutes; `concepts` and `methods` may be any of those there are."""

    concepts: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    kinds: tuple[Kind, ...] = ("neutral", "opposed")
    tune_prompts: int = 32
    test_prompts: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    max_tokens: int = 64
    temperature: float = 0.8
    extra_strengths: tuple[float, ...] = (1.0, 2.0)
    """Setpoints of `lqr` that are reported on the test prompts whatever was chosen."""

    def __post_init__(self) -> None:
        for name, known in (("concepts", JUDGES), ("methods", METHODS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown or not getattr(self, name):
                raise SpecError(name, expected=f"one or more of {', '.join(known)}", got=unknown or None)
        if "none" not in self.methods:
            raise SpecError(
                "methods", expected="`none` among them: perplexity is relative to it", got=list(self.methods)
            )
        for name in ("tune_prompts", "test_prompts", "max_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(name, expected="a number >= 1", got=getattr(self, name))
        if not self.seeds:
            raise SpecError("seeds", expected="at least one seed")


@dataclass(frozen=True)
class Cell:
    """The figures of one condition on one set of prompts."""

    concept: str
    method: str
    kind: Kind
    split: Literal["tune", "test"]
    strength: float
    chosen: bool
    n: int
    effect: float
    interval: tuple[float, float]
    effect_by_seed: list[float]
    perplexity: float
    perplexity_ratio: float
    distinct_2: float
    fluency: float
    effort: float
    tracking_mean: float
    tracking_sd: float
    tracking_error: float | None
    failed: int
    samples: list[str] = field(default_factory=list)


def run_suite(
    plant: Plant, bench: Bench, engine: AnyEngine, suite: Suite, progress: Progress | None = None
) -> list[Cell]:
    """Every cell of the suite: all strengths on `tune`, the chosen and the extra ones on `test`."""
    cells: list[Cell] = []
    todo = [(concept, kind) for concept in suite.concepts for kind in suite.kinds]
    for done, (concept, kind) in enumerate(todo):
        if progress:
            progress(f"{concept} ({kind})", done / len(todo))
        cells += _concept(plant, bench, engine, suite, concept, kind)
    if progress:
        progress("done", 1.0)
    return cells


def _concept(plant: Plant, bench: Bench, engine: AnyEngine, suite: Suite, concept: str, kind: Kind) -> list[Cell]:
    cells: list[Cell] = []
    base: dict[str, float] = {}

    def measure(method: str, strength: float, split: Literal["tune", "test"], chosen: bool) -> Cell:
        cell = _cell(plant, bench, engine, suite, Condition(concept, method, strength), kind, split, base, chosen)
        cells.append(cell)
        return cell

    for method in ("none", *(m for m in suite.methods if m != "none")):
        if not base:
            base["tune"] = measure("none", 0.0, "tune", False).perplexity
            base["test"] = measure("none", 0.0, "test", True).perplexity
            continue
        tuned = [measure(method, strength, "tune", False) for strength in METHODS[method]]
        best = choose(tuned, CAPS[kind])
        measure(method, best.strength, "test", True)
        if method.startswith("lqr"):
            for strength in suite.extra_strengths:
                if strength != best.strength:
                    measure(method, strength, "test", False)
    return cells


def choose(cells: Sequence[Cell], cap: float) -> Cell:
    """The cell of largest effect within the cap on perplexity; the one of least perplexity when none is within it."""
    within = [cell for cell in cells if cell.perplexity_ratio <= cap]
    if within:
        return max(within, key=lambda cell: (cell.effect, -cell.perplexity_ratio))
    return min(cells, key=lambda cell: cell.perplexity_ratio if math.isfinite(cell.perplexity_ratio) else math.inf)


def _cell(
    plant: Plant,
    bench: Bench,
    engine: AnyEngine,
    suite: Suite,
    condition: Condition,
    kind: Kind,
    split: Literal["tune", "test"],
    base: dict[str, float],
    chosen: bool,
) -> Cell:
    asked = prompts(condition.concept, kind, split, suite.tune_prompts if split == "tune" else suite.test_prompts)
    encoded = [tuple(plant.encode(prompt, open_end=True)) for prompt in asked]
    seeds = suite.seeds if split == "test" else suite.seeds[:1]
    program = condition.program(bench)
    results = engine.generate(
        [
            Request(
                f"{split}-{seed}-{i}",
                ids,
                Sampling(max_tokens=suite.max_tokens, temperature=suite.temperature, seed=1000 * seed + i),
                program,
                trace=True,
            )
            for seed in seeds
            for i, ids in enumerate(encoded)
        ]
    )
    judge = JUDGES[condition.concept]
    hits = np.array([bool(judge(result.text, asked[i % len(asked)])) for i, result in enumerate(results)])
    pairs = [(encoded[i % len(encoded)], result.tokens) for i, result in enumerate(results)]
    texts = [result.text for result in results]
    measured = perplexity(plant, pairs)
    mean, sd, effort = _tracking(results)
    target = condition.strength if condition.method.startswith(("lqr", "pid", "clamp")) else None
    return Cell(
        concept=condition.concept,
        method=condition.method,
        kind=kind,
        split=split,
        strength=condition.strength,
        chosen=chosen,
        n=len(results),
        effect=float(hits.mean()),
        interval=wilson(int(hits.sum()), len(hits)),
        effect_by_seed=[float(part.mean()) for part in hits.reshape(len(seeds), -1)],
        perplexity=measured,
        perplexity_ratio=measured / base.get(split, measured),
        distinct_2=distinct(texts, 2),
        fluency=float(np.mean([fluency(text) for text in texts])),
        effort=effort,
        tracking_mean=mean,
        tracking_sd=sd,
        tracking_error=None if target is None else abs(target - mean),
        failed=sum(result.error is not None for result in results),
        samples=texts[:3],
    )


def _tracking(results: Sequence[Finished]) -> tuple[float, float, float]:
    """Mean and spread of the projection at layers ≥ 3 (spread within a layer, then averaged), and mean effort."""
    by_layer: dict[int, list[float]] = {}
    efforts: list[float] = []
    for result in results:
        for token in result.trace or ():
            for reading in token:
                efforts.append(reading.effort)
                if reading.layer >= TRACKED_FROM:
                    by_layer.setdefault(reading.layer, []).append(reading.projection)
    if not by_layer:
        return math.nan, math.nan, math.nan
    means = [float(np.mean(values)) for values in by_layer.values()]
    spreads = [float(np.std(values)) for values in by_layer.values()]
    return float(np.mean(means)), float(np.mean(spreads)), float(np.mean(efforts))


def as_json(cells: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclasses of figures as JSON data: no NaN (null), four significant digits."""

    def clean(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else None
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    return [{name: clean(value) for name, value in asdict(cell).items()} for cell in cells]
