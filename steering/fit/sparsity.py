"""From calibration texts to a sparsity plan: what each linear map's input can do without, and what that costs.

    score_i = |x_i| (TEAL)   or   |x_i| ‖W_:,i‖ (WINA; W the stacked maps that read the site)
    t_p(s)  = the s-quantile of a site's scores over all coordinates and tokens: `steering.fit.quantiles`
    rest    = top right-singular vectors V_r of W: W(m⊙x) + U_r S_r V_rᵀ((1−m)⊙x) = W(m⊙x + V_r V_rᵀ (1−m)⊙x)

How the shares of the sites come about: `steering.fit.allocation`. With `perplexity_increase` p the level is not given
but found, by bisection until exp(loss − dense loss) = 1 + p on the fitted texts; with one CETT for all blocks that is
Sparsing Law's PPL-p%, and with `mlp_act` alone and `top_k` the mask is Lazy Neuron's, whose gains are of training.

Reported, on texts that are held out where there are ten: the share that really goes at each site, the perplexity ratio
at the target and at the levels of the literature, and that of as many coordinates dropped at random.
Source: TEAL, arXiv:2408.14690; WINA, arXiv:2505.19427; R-Sparse, arXiv:2504.19449; Sparsing Law, arXiv:2411.02335; Lazy
Neuron, arXiv:2210.06313.   Oracle: numpy's quantiles, and each module computed by hand on the masked input.
Of the published code we leave: TEAL's error of a block, a norm over the sequence in place of the hidden dimension
(ours is ‖output − reference‖ of each token, then averaged); WINA's norms for two of seven maps and its rotations;
budgets of keys and values as if they were of full width (R-Sparse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from steering.artifact import MAX_BYTES, checked_name
from steering.errors import PlantError, SpecError
from steering.fit.allocation import (
    Path,
    along_steps,
    along_tails,
    bisect,
    greedy_steps,
    overall,
    uniform,
)
from steering.fit.concept import FitSettings, Progress, part_of, provenance
from steering.fit.examples import Example
from steering.fit.quantiles import TAIL_STEPS, Table, tabled
from steering.fit.settings import chosen_blocks
from steering.fit.trial import READING, Row, Texts, Trial, calibration, ratio, within
from steering.plan.base import MAX_RANK
from steering.plan.sparsity import SPARSE_TAPS, Allocation, Rule, Score, SparseTap, SparsityPlan
from steering.plant.capture import Pause
from steering.plant.plant import Plant
from steering.plant.taps import linears_at
from steering.types import Site

LEVELS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Overall sparsities that a plan has thresholds for; between them it interpolates, an error below 0.2 % of a share."""
PUBLISHED = (0.25, 0.4, 0.5, 0.65)
"""Levels at which WINA and TEAL are evaluated, and at which every plan is."""
MAX_NUMBERS = 2**29
"""Most numbers that the activations of one block may be: two gigabytes, and as much again to sort one site's."""
GREEDY_TOKENS = 256
"""Tokens on which the greedy allocation measures a block's output."""
BISECTIONS, CLOSE = 16, 0.02
"""Most perplexities of a bisection, and how near it ends, as a share of the increase."""


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """How a sparsity plan is made. Raises SpecError for impossible values."""

    sparsity: float = 0.5
    """Share of the weights that need not be read, that the plan is made for; not read with `perplexity_increase`."""
    score: Score = "wina"
    """By what a coordinate counts: `magnitude` |x| (TEAL), or `wina` |x| times the norm of the weights that read it."""
    rule: Rule = "threshold"
    """`threshold` keeps what scores above a quantile, `top_k` as many of each token: the safer choice beside steering,
    which shifts scores."""
    sites: tuple[SparseTap, ...] | None = None
    """Inputs of linear maps that become sparse; null means all four, as far as the family has them."""
    layers: tuple[int, ...] | None = None
    """Blocks that become sparse; null means all."""
    allocation: Allocation = "uniform"
    """How the sparsity is shared out: `uniform`, `greedy` within each block (TEAL), or `cett`, one tail error for all
    blocks (Sparsing Law), for `mlp_act` alone and score `wina`."""
    step: float = 0.1
    """By how much the greedy allocation raises a block's smallest site at a time; published: 0.05."""
    perplexity_increase: float | None = None
    """Find the sparsity that raises perplexity by this share, 0.01 for 1 %; null means that `sparsity` says."""
    rank: int = 0
    """Rank of the rest, through which what is left out still goes (R-Sparse); 0 means none."""
    dense_share: float = 0.0
    """Leading part of each text that stays dense while the fit measures: 0.5 in TEAL's evaluation, 0.01 in WINA's."""
    tokens: int = 4096
    """Most tokens that are fitted, and most that are measured."""
    longest: int = 512
    """Tokens of one text that are read, from its beginning."""
    seed: int = 0
    """Of the random coordinates of the control."""

    def __post_init__(self) -> None:
        for name, least, most in (("sparsity", 0.01, LEVELS[-1]), ("step", 0.02, 0.5), ("dense_share", 0.0, 0.99)):
            _number(name, getattr(self, name), least, most)
        if self.perplexity_increase is not None:
            _number("perplexity_increase", self.perplexity_increase, 1e-4, 10.0)
        for name, least, most in (
            ("rank", 0, MAX_RANK),
            ("tokens", 16, 2**20),
            ("longest", 4, 2**17),
            ("seed", 0, 2**31),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise SpecError(name, expected=f"a whole number from {least} to {most}", got=value)
        for name, kinds in (("score", Score), ("rule", Rule), ("allocation", Allocation)):
            if getattr(self, name) not in get_args(kinds):
                raise SpecError(name, expected=f"one of {', '.join(get_args(kinds))}", got=getattr(self, name))
        if self.sites is not None and (not self.sites or any(tap not in SPARSE_TAPS for tap in self.sites)):
            raise SpecError("sites", expected=f"one or more of {', '.join(SPARSE_TAPS)}", got=list(self.sites))
        if self.allocation == "cett" and (self.score != "wina" or set(self.sites or ()) != {"mlp_act"}):
            raise SpecError(
                "allocation", expected="sites ['mlp_act'] and score 'wina' with allocation 'cett'", got="cett"
            )

    def chosen(self, plant: Plant) -> tuple[tuple[int, ...], tuple[SparseTap, ...]]:
        """Blocks and taps, in order. Raises SpecError for what the model does not have."""
        layers = chosen_blocks(self.layers, plant.depth)
        had = [tap for tap in SPARSE_TAPS if _has(plant, tap)]
        wanted = had if self.sites is None else [tap for tap in SPARSE_TAPS if tap in self.sites]
        if missing := [tap for tap in wanted if tap not in had]:
            raise SpecError(
                "sites", expected=f"sites that linear maps of this model read, {', '.join(had)}", got=missing
            )
        return layers, tuple(wanted)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block or a site that the model does not have, for too large a rank, and for more
        activations of one block than fit in memory."""
        _, taps = self.chosen(plant)
        width = sum(plant.width_of(Site(tap, 0)) for tap in taps)
        if self.tokens * width > MAX_NUMBERS:
            raise SpecError("tokens", expected=f"at most {MAX_NUMBERS // width} at these sites", got=self.tokens)
        most = min(min(plant.width_of(Site(tap, 0)), plant.width) for tap in taps)
        if self.rank > most:
            raise SpecError("rank", expected=f"at most {most}, which every site of this model has", got=self.rank)

    def reading(self) -> FitSettings:
        """What is read of an example."""
        return READING

    def first(self, rows: Sequence[Row]) -> list[int]:
        """The position of each text from which on it is sparse: never 0, and one at least that predicts a token."""
        return [min(max(1, math.ceil(self.dense_share * len(ids))), len(ids) - 2) for ids, _ in rows]


def fit_sparsity(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example] = (),
    settings: SparsitySettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> SparsityPlan:
    """Fit one plan from calibration texts, the `positive` examples. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (weights that are quantised).
    """
    settings = settings or SparsitySettings()
    checked_name(name)
    settings.for_model(plant)
    if negative:
        raise SpecError(
            "negative", expected="no examples: a sparsity plan takes its texts as positive", got=len(negative)
        )
    layers, taps = settings.chosen(plant)
    width = sum(plant.width_of(Site(tap, layers[0])) for tap in taps)
    if len(layers) * width * (2 + settings.rank) * 4 > MAX_BYTES // 2:
        raise SpecError("rank", expected="a lower rank, or fewer layers: the plan would pass half a gigabyte")
    checked, texts = calibration(plant, positive, tokens=settings.tokens, longest=settings.longest, pause=pause)
    table = tabled(
        plant,
        texts.fitted,
        layers,
        taps,
        score=settings.score,
        rank=settings.rank,
        tails=settings.allocation == "cett",
        progress=part_of(progress, "scores", 0.0, 0.3),
        pause=pause,
    )
    sites = [Site(tap, layer) for layer in layers for tap in taps]
    fitted = Trial(plant, texts.fitted, sites, settings.first(texts.fitted), pause)
    path = _path(plant, table, settings, texts, part_of(progress, "allocation", 0.3, 0.6), pause)
    size_S = torch.tensor(table.size)
    target, increase = settings.sparsity, None
    if settings.perplexity_increase is not None:
        target, increase = _to_perplexity(fitted, table, path, settings)
    target = next((level for level in LEVELS if abs(level - target) < 1e-9), target)
    levels = tuple(sorted({*LEVELS, target}))
    share_nSM = torch.stack([_at_level(path, level, size_S)[1] for level in levels], dim=-1)
    threshold = [
        [[table.threshold(r, s, float(share)) for share in shares] for s, shares in enumerate(row)]
        for r, row in enumerate(share_nSM)
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    plan = SparsityPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance=provenance(asdict(settings) | {"layers": list(layers), "sites": list(taps)}, {"positive": checked}),
        layers=layers,
        sites=taps,
        widths=tuple(len(weight) for weight in table.weight[0]),
        size=table.size,
        score=settings.score,
        rule=settings.rule,
        allocation=settings.allocation,
        target=target,
        levels=levels,
        weight=torch.stack([torch.cat(row) for row in table.weight]),
        share=share_nSM.float().clamp(0, 1),
        threshold=torch.tensor(threshold, dtype=torch.float32),
        realised=torch.zeros(len(layers), len(taps)),
        rest=torch.stack([torch.cat(row, dim=1) for row in table.rest]),
        control=torch.rand(len(layers), width, generator=generator),
    )
    plan = _measured(plant, plan, texts, sites, settings, part_of(progress, "perplexity", 0.7, 0.99), pause)
    quality = dict(plan.quality)
    if increase is not None:
        quality["perplexity_increase"] = {"asked": settings.perplexity_increase, "fitted": round(increase, 5)}
    if settings.allocation == "cett":
        quality["cett"] = round(_at_level(path, target, size_S)[0], 5)
    plan = replace(plan, quality=quality)
    if progress:
        progress("done", 1.0)
    return plan


def _number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise SpecError(name, expected=f"a number from {least:g} to {most:g}", got=value)


def _has(plant: Plant, tap: SparseTap) -> bool:
    try:
        return bool(linears_at(plant.model, plant.layout, Site(tap, 0)))
    except PlantError:
        return False


def _path(
    plant: Plant,
    table: Table,
    settings: SparsitySettings,
    texts: Texts,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> Path:
    """How the shares rise."""
    n, S = len(table.layers), len(table.taps)
    if settings.allocation == "cett":
        return along_tails(table.tails, torch.arange(TAIL_STEPS + 1) / TAIL_STEPS)
    if settings.allocation == "uniform" or S == 1:
        return uniform(n, S)
    rows = within(texts.fitted, GREEDY_TOKENS)
    sites = [Site(tap, layer) for layer in table.layers for tap in table.taps]
    trial = Trial(plant, rows, sites, settings.first(rows), pause)
    trial.note_blocks(trial.fullest)
    steps = []
    for row, layer in enumerate(table.layers):
        before_TD = trial.block(layer)

        def moved(share_S: Tensor, row: int = row, layer: int = layer, before_TD: Tensor = before_TD) -> float:
            shares_nS = share_S.expand(n, S)
            after_TD = trial.block(layer, table.edits(shares_nS, settings.rule, [row]))
            return float((after_TD - before_TD).norm(dim=-1).mean())

        steps.append(greedy_steps(moved, torch.tensor(table.size), step=settings.step, most=LEVELS[-1]))
        progress(row + 1, n)
    return along_steps(steps, torch.tensor(table.size))


def _at_level(path: Path, level: float, size_S: Tensor) -> tuple[float, Tensor]:
    """How far along the path the overall sparsity is `level`, and the shares (n, S) there."""
    if abs(overall(path(level), size_S) - level) < 1e-12:  # the path is walked by the level itself
        return level, path(level)
    u, _ = bisect(lambda u: overall(path(u), size_S), level, steps=60, tolerance=1e-9)
    return u, path(u)


def _to_perplexity(trial: Trial, table: Table, path: Path, settings: SparsitySettings) -> tuple[float, float]:
    """The level at which perplexity has risen by what was asked, on the fitted texts; and by how much it has."""
    dense, size_S = trial.loss(), torch.tensor(table.size)
    aim, most = cast("float", settings.perplexity_increase), LEVELS[-1]

    def risen(u: float) -> float:
        share_nS = _at_level(path, most * u, size_S)[1]
        return ratio(trial.loss(table.edits(share_nS, settings.rule)), dense) - 1

    u, found = bisect(risen, aim, steps=BISECTIONS, tolerance=CLOSE * aim)
    return max(most * u, 1e-3), found


def _measured(
    plant: Plant,
    plan: SparsityPlan,
    texts: Texts,
    sites: Sequence[Site],
    settings: SparsitySettings,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> SparsityPlan:
    """The plan with its figures."""
    trial = Trial(plant, texts.measured, sites, settings.first(texts.measured), pause)
    dense = trial.loss()
    reached = ratio(trial.loss(plan.edits(plan.target)), dense)
    dropped = trial.dropped()
    rows = [[dropped.get(Site(tap, layer), 0.0) for tap in plan.sites] for layer in plan.layers]  # type: ignore[arg-type]
    realised = torch.tensor(rows)
    progress(2, 4 + len(PUBLISHED))
    random = ratio(trial.loss(plan.edits(plan.target, control=True)), dense)
    curve = {}
    for level in PUBLISHED:
        curve[str(level)] = reached if level == plan.target else ratio(trial.loss(plan.edits(level)), dense)
        progress(3 + len(curve), 4 + len(PUBLISHED))
    size_S = torch.tensor(plan.size)
    quality: dict[str, Any] = {
        "measured_on": texts.measured_on,
        "tokens": texts.tokens,
        "target": round(plan.target, 4),
        "realised": round(overall(realised, size_S), 4),
        "realised_by_site": {tap: [round(row[i], 4) for row in rows] for i, tap in enumerate(plan.sites)},
        "perplexity": round(math.exp(min(dense, 80.0)), 4),
        "perplexity_ratio": round(reached, 4),
        "perplexity_ratio_at": {level: round(value, 4) for level, value in curve.items()},
        "random": {"perplexity_ratio": round(random, 4)},
    }
    if random <= reached:
        quality["warning"] = (
            f"As many coordinates dropped at random cost no more perplexity ({random:.3f} times) than the chosen ones "
            f"({reached:.3f}): give more and longer texts, of the kind that will be served."
        )
    elif texts.measured_on != "held-out":
        quality["warning"] = "The figures are of the very texts that were fitted: give ten or more."
    return replace(plan, realised=realised, quality=quality)
