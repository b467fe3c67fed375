"""From calibration texts to a drop list: which attentions and MLPs hardly turn the residual stream.

    S_M(l) = mean over tokens of cos(h, h + a),   h the stream before module M of block l, a what M adds to it
    influence(l) = 1 − mean over tokens of cos(x_l, x_{l+1})

The module with the highest S goes first, in one shot. h + a of an attention is the block's output without its MLP, run
from the very input that the block met, so that a post-norm is part of a and no family needs a rule of its own; where
attention and MLP stand side by side (GPT-NeoX) the MLP is scored behind the attention.
Reported: the perplexity ratio at each number of modules dropped, of attentions, of MLPs and of both, and that of as
many in a random order; on texts that are held out where there are ten. Position 0 enters no mean: its norm would.
Cost: two forward passes for the scores, one of the measured texts for each number.
Source: LLM-Drop, arXiv:2406.15786 (scores, one shot, joint); ShortGPT, arXiv:2403.03853 (influence).
Oracle: the contributions formed from the sites, one text at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.artifact import checked_name
from steering.edit import Mask
from steering.errors import SpecError
from steering.fit.concept import FitSettings, Progress, part_of, provenance
from steering.fit.examples import Example
from steering.fit.trial import READING, Row, Texts, Trial, calibration, ratio
from steering.plan.layers import LayersPlan, Module
from steering.plant.capture import Pause
from steering.plant.plant import Plant
from steering.types import Site

OUT: dict[Module, Any] = {"attention": "attn_out", "mlp": "mlp_out"}
"""The tap of a module's output."""


@dataclass(frozen=True, kw_only=True)
class LayersSettings:
    """How a drop list is made. Raises SpecError for impossible values."""

    most: int | None = None
    """Perplexity is measured with 1 to so many modules of each list dropped; null means half of the blocks."""
    tokens: int = 4096
    """Most tokens that are scored, and most that are measured."""
    longest: int = 512
    """Tokens of one text that are read, from its beginning."""
    seed: int = 0
    """Of the random order of the control."""

    def __post_init__(self) -> None:
        for name, least, most in (("tokens", 16, 2**20), ("longest", 4, 2**17), ("seed", 0, 2**31)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise SpecError(name, expected=f"a whole number from {least} to {most}", got=value)
        if self.most is not None and (type(self.most) is not int or self.most < 0):
            raise SpecError("most", expected="a whole number >= 0, or null", got=self.most)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for more blocks than the model has."""
        if self.most is not None and self.most > plant.depth:
            raise SpecError("most", expected=f"at most {plant.depth}, the model's blocks", got=self.most)

    def reading(self) -> FitSettings:
        """What is read of an example."""
        return READING


def fit_layers(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example] = (),
    settings: LayersSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> LayersPlan:
    """Fit one plan from calibration texts, the `positive` examples. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named).
    """
    settings = settings or LayersSettings()
    checked_name(name)
    settings.for_model(plant)
    if negative:
        raise SpecError("negative", expected="no examples: a drop list takes its texts as positive", got=len(negative))
    checked, texts = calibration(plant, positive, tokens=settings.tokens, longest=settings.longest, pause=pause)
    score_2L, influence_L = scores(plant, texts.fitted, part_of(progress, "scores", 0.0, 0.2), pause)
    generator = torch.Generator().manual_seed(settings.seed)
    plan = LayersPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance=provenance(asdict(settings), {"positive": checked}),
        score=score_2L,
        influence=influence_L,
        order=tuple(score_2L.flatten().argsort(descending=True, stable=True).tolist()),
        control=tuple(torch.randperm(2 * plant.depth, generator=generator).tolist()),
    )
    report = part_of(progress, "perplexity", 0.2, 0.99)
    plan = replace(plan, quality=_measured(plant, plan, texts, settings, report, pause))
    if progress:
        progress("done", 1.0)
    return plan


def scores(
    plant: Plant,
    rows: Sequence[Row],
    progress: Callable[[int, int], None] | None = None,
    pause: Pause | None = None,
) -> tuple[Tensor, Tensor]:
    """S (2, L) of attentions and MLPs, and the influence (L,) of blocks, float32 from float64 sums."""
    trial = Trial(plant, rows, [Site("mlp_out", layer) for layer in range(plant.depth)], [1] * len(rows), pause)
    gone = Mask.of(torch.zeros(plant.width))
    total_3L = torch.zeros(3, plant.depth, dtype=torch.float64)
    for batch in range(trial.batches):
        trial.note_blocks(batch)
        for layer in range(plant.depth):
            x_TD = trial.block_input(layer).double()
            mid_TD = trial.block(layer, {Site("mlp_out", layer): gone}).double()
            out_TD = trial.block(layer).double()
            pairs = ((x_TD, mid_TD), (mid_TD, out_TD), (x_TD, out_TD))
            total_3L[:, layer] += torch.stack([torch.cosine_similarity(a, b, dim=-1).sum() for a, b in pairs]).cpu()
        if progress:
            progress(batch + 1, trial.batches)
    mean_3L = (total_3L / sum(len(ids) - start for ids, start in rows)).clamp(-1, 1)
    return mean_3L[:2].float(), (1 - mean_3L[2]).float()


def _measured(
    plant: Plant,
    plan: LayersPlan,
    texts: Texts,
    settings: LayersSettings,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[str, Any]:
    """Perplexity ratios with 1, 2, … modules dropped, in the plan's order and in the random one."""
    sites = [Site(tap, layer) for layer in range(plant.depth) for tap in OUT.values()]
    trial = Trial(plant, texts.measured, sites, [0] * len(texts.measured), pause)
    gone = Mask.of(torch.zeros(plant.width))
    dense = trial.loss()
    most = max(1, plant.depth // 2) if settings.most is None else settings.most
    known: dict[frozenset[tuple[Module, int]], float] = {}
    done = 0

    def ratios(order: Sequence[tuple[Module, int]]) -> list[float]:
        nonlocal done
        found = []
        for count in range(1, most + 1):
            chosen = frozenset(order[:count])
            if chosen not in known:
                known[chosen] = ratio(trial.loss({Site(OUT[m], layer): gone for m, layer in chosen}), dense)
            found.append(round(known[chosen], 4))
            done += 1
            progress(done, 6 * most)
        return found

    def lists(*, control: bool) -> dict[str, list[float]]:
        modules: tuple[Module, Module] = ("attention", "mlp")
        single: dict[str, list[float]] = {
            m: ratios([(m, layer) for layer in plan.ordered(m, control=control)]) for m in modules
        }
        return single | {"joint": ratios(plan.joint(control=control))}

    quality: dict[str, Any] = {
        "measured_on": texts.measured_on,
        "tokens": texts.tokens,
        "attention": [round(float(s), 4) for s in plan.score[0]],
        "mlp": [round(float(s), 4) for s in plan.score[1]],
        "influence": [round(float(s), 4) for s in plan.influence],
        "perplexity": round(math.exp(min(dense, 80.0)), 4),
        "perplexity_ratio": lists(control=False),
        "random": {"perplexity_ratio": lists(control=True)},
    }
    chosen, random = (sum(math.log(r) for r in q["perplexity_ratio"]["joint"]) for q in (quality, quality["random"]))
    if random < chosen:
        quality["warning"] = (
            "Modules dropped in a random order cost less perplexity than in the plan's: the scores say little here; "
            "give more and longer texts, or choose the blocks by hand."
        )
    elif texts.measured_on != "held-out":
        quality["warning"] = "The figures are of the very texts that were scored: give ten or more."
    return quality
