"""Single neurons: silence, damp or amplify them, or put them at their mean; AurA, Det-0, Damp, and SenD's dropping.

    x'_m = s_m x_m + b_m        for the chosen units m of a site, all others as they are

    zero      s = 0                                  Det-0
    damp      s = factor (½)                         Damp; above 1 amplifies
    aura      s = 1 − 2 (AUROC_m − ½) where AUROC_m > ½, else 1
    mean      s = 0, b = the unit's mean over the negative class
    shrink    s = 1 − γ, b = γ · that mean           γ = factor (½)

Massive dimensions are never among the units of a plan. Published, all of these act at every token, that is with `apply`
{"prompt": "all", "generation": "all"}; position 0 is left out of it here.
Shapes: s, b (E,), one mask a block.   Cost: two multiply-adds per unit of the site and token.
Source: AurA, arXiv:2407.12824, Sec. 3 (and Det-0, Damp, its baselines); SenD, arXiv:2410.15460.
Oracle: the columns of the MLP's last weight scaled, and its bias moved.
Of the published code we leave: scaling at position 0 with the rest, and units counted over pads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.edit import Mask
from steering.errors import SpecError
from steering.methods.base import checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan.neurons import NeuronsPlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, edit_at

_MODES = ("zero", "damp", "aura", "mean", "shrink")


@register
@dataclass(frozen=True, kw_only=True)
class Neurons(PlanIntervention):
    """Silence, damp, amplify or fix the neurons that a plan has chosen."""

    plan_kind: ClassVar[str] = NeuronsPlan.kind

    type: Literal["neurons"] = "neurons"
    mode: Literal["zero", "damp", "aura", "mean", "shrink"] = "aura"
    """`zero` (Det-0), `damp` by `factor`, `aura` (each by its own AUROC), the negative class's `mean`, or `shrink`
    towards that mean by `factor`."""
    factor: float | None = None
    """Of `damp`: what is left of a unit; of `shrink`: how far it goes to its mean. Null means 0.5."""
    units: int | None = None
    """Use the first so many of the plan's units, in the order of their choice; null means all."""
    sign: Literal["positive", "negative", "both"] = "positive"
    """Units of which the positive class has more, the negative class, or either."""
    control: bool = False
    """Use the plan's random units instead of the chosen ones: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise SpecError("mode", expected=f"one of {', '.join(_MODES)}", got=self.mode)
        if self.sign not in ("positive", "negative", "both"):
            raise SpecError("sign", expected="positive, negative or both", got=self.sign)
        if self.factor is not None:
            if self.mode not in ("damp", "shrink"):
                raise SpecError("factor", expected=f"null: {self.mode} has no factor", got=self.factor)
            checked_number("factor", self.factor, least=-100.0, most=100.0)
            if self.factor == (1 if self.mode == "damp" else 0):
                raise SpecError("factor", expected="a factor that changes something", got=self.factor)
        if self.units is not None and (type(self.units) is not int or self.units < 1):
            raise SpecError("units", expected="a whole number >= 1, or null", got=self.units)

    def compile(self, bench: Bench) -> Term:
        """One mask at the plan's site in each block that has chosen units."""
        plan = bench.plan(self.plan, NeuronsPlan)
        layers = self.chosen_layers(plan.layers, bench.depth)
        picked = self._picked(plan, layers)
        scale_M, shift_M = self._edit(plan, picked)
        if not bool(((scale_M != 1) | (shift_M != 0)).any()):
            raise SpecError("mode", expected=f"a mode that changes units of plan {self.plan!r}", got=self.mode)
        index_M = (plan.control if self.control else plan.index)[picked].long()
        laws: dict[Route, Mask] = {}
        for layer, span in zip(plan.layers, plan.spans, strict=True):
            here = plan.layer[picked] == layer
            if layer in layers and bool(here.any()):
                scale_E, shift_E = scale_M.new_ones(span), scale_M.new_zeros(span)
                scale_E[index_M[here]], shift_E[index_M[here]] = scale_M[here], shift_M[here]
                laws[edit_at("mask", plan.site, layer)] = Mask.of(
                    scale_E, shift_E, strength=self.strength, cap=self.cap
                )
        return self.planned_term("neurons", laws, without_first(self.apply))

    def _picked(self, plan: NeuronsPlan, layers: tuple[int, ...]) -> Tensor:
        """The rows of the plan that are used, in its order. Raises SpecError where there are none, or too few."""
        fits = torch.isin(plan.layer, torch.tensor(layers, dtype=plan.layer.dtype))
        if self.sign != "both":
            fits &= plan.score > 0 if self.sign == "positive" else plan.score < 0
        rows = torch.nonzero(fits).flatten()
        if not len(rows):
            raise SpecError("sign", expected=f"units that plan {self.plan!r} has in these layers", got=self.sign)
        if self.units is not None and self.units > len(rows):
            raise SpecError(
                "units", expected=f"at most {len(rows)}, which plan {self.plan!r} has there", got=self.units
            )
        return rows[: self.units]

    def _edit(self, plan: NeuronsPlan, picked: Tensor) -> tuple[Tensor, Tensor]:
        """s and b of each unit that is used; a random unit gets the s of the one it stands for, and its own mean."""
        factor = 0.5 if self.factor is None else self.factor
        mean_M = (plan.control_negative if self.control else plan.negative)[picked]
        one_M = torch.ones_like(mean_M)
        match self.mode:
            case "zero":
                return 0 * one_M, 0 * one_M
            case "damp":
                return factor * one_M, 0 * one_M
            case "aura":
                return 1 - 2 * (plan.auroc[picked] - 0.5).clamp_min(0), 0 * one_M
            case "mean":
                return 0 * one_M, mean_M
        return (1 - factor) * one_M, factor * mean_M
