"""What steering costs in tokens per second: steered ÷ unsteered throughput of a full batch, and the time of a fit.

Each figure is a ratio of two runs that a busy machine slows alike, and the median of several such pairs, in alternating
order. On a CPU two engines take turns at every step, steered and unsteered; on a GPU, where one's launches would delay
the other's, whole runs follow each other. A run serves more requests than the batch has places where there are more
programs than places: the next request takes the place of one that ended.

    programs       distinct programs among the requests, request i has program i mod n
    interventions  laws of A-LQR's route (error at a block's input, control at its output) that superpose in a request
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steering.control import Weights
from steering.errors import SpecError
from steering.fit.concept import gains_along
from steering.law import Law
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.program import Program, Scope, Term
from steering.runtime import Engine, EngineSettings, Event, Finished, Request, Sampling
from steering.types import Gains, across

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is run. Raises SpecError for a size below 1."""

    batch: int = 16
    """Places of the batch."""
    programs: tuple[int, ...] = (1, 16, 64)
    """Distinct programs, a row each with one intervention."""
    interventions: tuple[int, ...] = (1, 4, 16)
    """Interventions of a request, a row each with as many programs as places."""
    prompt_tokens: int = 16
    max_tokens: int = 64
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "max_tokens", "repeats", "programs", "interventions"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise SpecError(name, expected="numbers >= 1", got=value)

    @property
    def cases(self) -> list[tuple[int, int]]:
        """(programs, interventions) of each row."""
        own = [(self.batch, n) for n in self.interventions if n > 1]
        return [(n, 1) for n in self.programs] + own


@dataclass(frozen=True)
class Overhead:
    """One row: medians in tokens per second, and the median of the pairs' ratios with the smallest and the largest."""

    programs: int
    interventions: int
    requests: int
    plain: float
    steered: float
    ratio: float
    least: float
    most: float


def overhead(plant: Plant, load: Load, progress: Progress | None = None) -> list[Overhead]:
    """Steered ÷ unsteered throughput, one row for each case of `load`."""
    slots = max(*load.programs, load.batch)
    length = load.prompt_tokens + load.max_tokens
    settings = EngineSettings(max_batch=load.batch, program_slots=slots, max_model_len=length, prefix_cache=False)
    one = Engine(plant, settings)
    other = Engine(plant, settings) if plant.device.type == "cpu" else one
    vocabulary = min(plant.vocab, 1000) - 3
    found = []
    try:
        for done, (n_programs, n_interventions) in enumerate(load.cases):
            if progress:
                progress(f"{n_programs} programs, {n_interventions} interventions", done / len(load.cases))
            n = max(load.batch, n_programs)
            programs = [program(plant, seed, n_interventions) for seed in range(n_programs)]
            prompts = [tuple((7 * i + j) % vocabulary + 3 for j in range(load.prompt_tokens)) for i in range(n)]
            few = min(8, load.max_tokens)  # programs become resident, taps are installed, graphs recorded
            rate(other, prompts, programs, few)
            rate(one, prompts, [], few)
            pairs = []
            for i in range(load.repeats):
                runs = [_Run(one, prompts, [], load.max_tokens), _Run(other, prompts, programs, load.max_tokens)]
                take_turns(runs if i % 2 else runs[::-1])
                pairs.append(tuple(n * load.max_tokens / run.seconds for run in runs))
            ratios = [steered / plain for plain, steered in pairs]
            plain, steered = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
            found.append(
                Overhead(
                    n_programs, n_interventions, n, plain, steered, statistics.median(ratios), min(ratios), max(ratios)
                )
            )
    finally:
        one.stop()
        other.stop()
    if progress:
        progress("done", 1.0)
    return found


class _Run:
    """Requests of one length, one a prompt, on their way through an engine; request i has program i mod n, if any."""

    def __init__(
        self, engine: Engine, prompts: Sequence[tuple[int, ...]], programs: Sequence[Program], tokens: int
    ) -> None:
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.engine = engine
        self.seconds = 0.0
        self._waiting = deque(
            Request(f"rate-{i}", prompt, sampling, programs[i % len(programs)] if programs else Program())
            for i, prompt in enumerate(prompts)
        )
        self._running = 0
        self._failure: Exception | None = None

    def step(self) -> bool:
        """Fill the batch, take one step, and count the time. False when all requests have ended.

        Raises what a request failed with.
        """
        start = time.perf_counter()
        while self._waiting and self._running < self.engine.settings.max_batch:
            self.engine.submit(self._waiting.popleft(), self._see)
            self._running += 1
        self.engine.step()
        self.seconds += time.perf_counter() - start
        if self._failure is not None:
            raise self._failure
        return bool(self._running or self._waiting)

    def _see(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._running -= 1
            self._failure = self._failure or event.error


def take_turns(runs: Sequence[_Run]) -> None:
    """Run to the end; those of different engines in turn, those of one engine one after another."""
    if len({id(run.engine) for run in runs}) < len(runs):
        for run in runs:
            while run.step():
                pass
        return
    going = list(runs)
    while going:
        going = [run for run in going if run.step()]


def rate(engine: Engine, prompts: Sequence[tuple[int, ...]], programs: Sequence[Program], tokens: int) -> float:
    """Generated tokens per second of one request a prompt, each `tokens` long, prompts included.

    Request i has program i mod n, or none where there is no program. Only for an engine that was not started.
    """
    run = _Run(engine, prompts, programs, tokens)
    take_turns([run])
    return len(prompts) * tokens / run.seconds


def program(plant: Plant, seed: int, interventions: int = 1) -> Program:
    """A program as `lqr` compiles it: unit probes and gains along them on all blocks but the first, with its gauges."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for n in range(interventions):
        laws = {}
        for layer in range(min(1, plant.depth - 1), plant.depth):
            direction = torch.randn(plant.width, generator=generator)
            direction /= direction.norm()
            laws[across(layer)] = Law.of(direction, 1.0, 0.5 / interventions * direction)
        gauges = dict.fromkeys(laws, (0.0, 1.0))
        terms.append(Term(f"c{seed}-{n}", "lqr", laws, Scope(), target=1.0, gauges=gauges))
    return Program(tuple(terms))


def fit_times(
    plant: Plant, progress: Progress | None = None, *, prompts: int = 16, length: int = 16
) -> dict[str, float]:
    """Seconds that the gains of one concept take, dense and matrix-free, at all blocks but the first.

    Of a fit only the Jacobians, or the products with them, along random prompts, and the recursion: reading the
    examples is the same for both.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, min(plant.vocab, 1000), (prompts, length), generator=generator).tolist()
    v_LD = torch.nn.functional.normalize(torch.randn(plant.depth + 1, plant.width, generator=generator), dim=1)
    layers = range(min(1, plant.depth - 1), plant.depth)
    kinds: tuple[Gains, ...] = ("dense", "matrix_free")
    found: dict[str, float] = {}
    for kind in kinds:
        if progress:
            progress(f"{kind} gains", len(found) / len(kinds))
        start = time.perf_counter()
        linear = Linearisation(plant, rows, max_context=length)
        gains_along(linear, kind, v_LD, Weights(1.0, 1.0, 1.0), layers, lambda *_: None)
        found[kind] = time.perf_counter() - start
    return found


COLUMNS = ("programs", "interventions", "requests", "plain tok/s", "steered tok/s", "ratio", "from", "to")


def lines(rows: Sequence[Overhead]) -> list[tuple[str, ...]]:
    """One row of text for each, in the order of `COLUMNS`."""
    return [
        (
            str(row.programs),
            str(row.interventions),
            str(row.requests),
            f"{row.plain:.0f}",
            f"{row.steered:.0f}",
            *(f"{ratio:.3f}" for ratio in (row.ratio, row.least, row.most)),
        )
        for row in rows
    ]
