"""Language: move the state from one language's autoencoder features towards another's, in the leading subspace.

    u = λ (m Σ_j t_j d_j − β (Σ_i s_i z_i(h)) Σ_j s_j d_j)          h' = h + u at each block of the plan's window

t and s are the unit vectors of the target's and the source's features inside the leading subspace of the paired
differences, z_i the rectified activations, d_j what one unit of a feature writes, m the distance of the means along t
(`units: contrast`; 1 in `absolute` units, the published form). One law a block: one open-loop channel for the first
term, one rectified channel for each feature that s weighs.
Published grids take β up to 1. But the kept features are all the target's, so what the source has of them points the
same way: where the subspace has one direction, as on the embedded model at every block, s = t, and β only takes back
what λ adds. Hence β = 0 by default.
Position 0 is left out of `apply.prompt: all`.
Shapes: K ≤ 127 kept features.   Cost: 2·2·(K + 1)·D multiply-adds per token and layer.
Source: Neural FOXP2, arXiv:2602.00945, stage III.   Oracle: Δz = λ t − λβ P((z·s) s) formed explicitly and decoded.
Of the published code we leave: the autoencoder trained on normalised states that encodes raw ones; the first prompt of
a batch encoded for all of them; training at the block's input and editing its output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from steering.errors import SpecError
from steering.methods.base import checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import LanguagePlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class Language(PlanIntervention):
    """Move from the source language's features to the target's; `strength` is λ."""

    plan_kind: ClassVar[str] = LanguagePlan.kind

    type: Literal["language"] = "language"
    suppress: float = 0.0
    """β, how much of the source's part is taken away, as a share of λ; 0 only adds. Where `overlap` in the plan's
    quality is near 1 both parts are one direction, and suppression works against the addition."""
    units: Literal["contrast", "absolute"] = "contrast"
    """`contrast`: λ counts distances of the classes' means; `absolute`: units of activation, as published."""
    control: bool = False
    """Use random features in place of the kept ones, writing as much: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("suppress", self.suppress, least=0.0, most=100.0)
        if self.units not in ("contrast", "absolute"):
            raise SpecError("units", expected="contrast or absolute", got=self.units)

    def compile(self, bench: Bench) -> Term:
        """One law at the autoencoder's site of each block of the window."""
        plan = bench.plan(self.plan, LanguagePlan)
        laws = {}
        for layer in self.chosen_layers(plan.layers, bench.depth):
            law = plan.law(
                plan.layers.index(layer),
                suppress=self.suppress,
                contrast=self.units == "contrast",
                control=self.control,
            )
            cap_R = torch.full_like(law.cap, self.cap / law.rank)
            laws[at(plan.tap, layer)] = replace(self.strength * law, cap=cap_R)
        return self.planned_term("language", laws, without_first(self.apply))
