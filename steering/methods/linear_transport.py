"""Linear transport: move every coordinate from where one class of texts has it to where the other has it.

    z'_i = λ (ω_i z_i + b_i) + (1 − λ) z_i   where  low_i ≤ z_i ≤ high_i,   else  z'_i = z_i

ω and b are those of one-dimensional optimal transport under affine maps (`steering.fit.transport`): Linear-AcT, and
Mean-AcT where ω = 1. λ is the strength: 0 leaves the model as it is, 1 is the map. Outside the fitted support nothing
is known of the map and nothing is done. The support is that of means over texts, which vary less than tokens, so look
at the receipt: it tells the share of coordinates that lay inside (two in five on the embedded model; a fit with
`support: all` maps every one). Position 0 is left out of `apply.prompt: all`.
Shapes: ω, b, low, high (n, D).   Cost: a few multiply-adds per coordinate, token and layer.
Source: Linear-AcT, arXiv:2410.23054, Sec. 3.   Oracle: the formula, coordinate by coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from steering.edit import Mask
from steering.errors import SpecError
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import TransportPlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import edit_at


@register
@dataclass(frozen=True, kw_only=True)
class LinearTransport(PlanIntervention):
    """Transport activations from one class of texts to the other, coordinate by coordinate."""

    plan_kind: ClassVar[str] = TransportPlan.kind

    type: Literal["linear_transport"] = "linear_transport"
    control: bool = False
    """Give each coordinate the map of a random other one: what a claim has to be compared with."""

    def compile(self, bench: Bench) -> Term:
        """One mask at each chosen block."""
        plan = bench.plan(self.plan, TransportPlan)
        scale, shift = (plan.control_scale, plan.control_shift) if self.control else (plan.scale, plan.shift)
        masks = {}
        layers = self.chosen_layers(plan.layers, bench.depth)
        rows = [plan.layers.index(layer) for layer in layers]
        if not bool((scale[rows] != 1).any() or shift[rows].any()):
            raise SpecError("plan", expected="a plan whose maps change something in these layers", got=self.plan)
        for row, layer in zip(rows, layers, strict=True):
            masks[edit_at("mask", plan.site, layer)] = Mask.of(
                scale[row], shift[row], plan.low[row], plan.high[row], strength=self.strength, cap=self.cap
            )
        return self.planned_term("linear_transport", masks, without_first(self.apply))
