"""EigenShift: damp, or shift, the directions at the final norm that the head turns into unwanted words.

    W = U Σ Vᵀ,   a_i = v_i·h,   logits = Σ_i σ_i a_i u_i                    the head, (V_words, D)
    h' = h − (1 − α) V_k V_kᵀ h + s V_k Δ                                    W h' = U Σ' Vᵀ h + s W V_k Δ

Damping α scales the chosen σ_i as the published edit W' = U Σ' Vᵀ does, without another head: it is a rank-k law on
the final norm's output, so tied and quantised heads work, and so does a soft cap behind them. The shift s moves the
mean along the chosen directions by s differences of the class means, Δ_i = v_i·(μ₊ − μ₋): s = −1 takes the positive
examples' mean to the negative ones'. Damping knows no sign: it takes what opposes the words with what makes them.
Shapes: V_k (k, D), Δ (k,).   Cost: 2·2·k·D multiply-adds per token.   `max_effort` is shared out over the k channels.
Source: EigenShift, arXiv:2509.16660, Sec. 3; the shift is ours.   Oracle: W' and its logits formed explicitly.
Of the published code we leave: V h in place of Vᵀh in the selection, which picks arbitrary directions; ranking by the
sign that the decomposition happens to give (`steering.fit.eigenshift`); unequal positions of the two classes; the
edited copy of the head, which a tied embedding does not survive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import LARGEST, checked_number
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import EigenshiftPlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class Eigenshift(PlanIntervention):
    """Damp or shift the head's eigen-directions that a plan has chosen."""

    plan_kind: ClassVar[str] = EigenshiftPlan.kind

    type: Literal["eigenshift"] = "eigenshift"
    alpha: float | None = None
    """α, what is left of the chosen components: 0 removes them, 1 leaves them, below 0 inverts them. Null means 0, the
    published value, or 1 where `shift` is given."""
    shift: float = 0.0
    """s, how many differences of the class means are added along the chosen components; negative: away from the
    positive examples."""
    components: int | None = None
    """Use the first so many of the plan's components, in the order of their selection; null means all."""
    control: bool = False
    """Use the plan's random components instead of the chosen ones: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            checked_number("alpha", self.alpha, least=-1.0, most=2.0)
        checked_number("shift", self.shift)
        if self.left == 1 and self.shift == 0:
            raise SpecError("alpha", expected="an alpha other than 1, or a shift other than 0", got=self.alpha)
        if self.layers is not None:
            raise SpecError("layers", expected="null: eigenshift acts at the final norm", got=list(self.layers))

    @property
    def left(self) -> float:
        """α with its default."""
        return (0.0 if self.shift == 0 else 1.0) if self.alpha is None else self.alpha

    def compile(self, bench: Bench) -> Term:
        """One rank-k law at the final norm."""
        plan = bench.plan(self.plan, EigenshiftPlan)
        V_KD, shift_K = (plan.control, plan.control_shift) if self.control else (plan.basis, plan.shift)
        k = len(V_KD) if self.components is None else self.components
        if not isinstance(k, int) or not 1 <= k <= len(V_KD):
            raise SpecError("components", expected=f"1 to {len(V_KD)}, which plan {self.plan!r} has", got=k)
        laws = {at("final"): self._law(V_KD[:k], shift_K[:k])}
        return self.planned_term("eigenshift", laws, without_first(self.apply))

    def _law(self, V_KD: torch.Tensor, shift_K: torch.Tensor) -> Law:
        """(1 − α)(s Δ/(1 − α) − V h) V; without damping the open loop s Δ V. So α and s are knobs, not slots."""
        damped = 1.0 - self.left
        target_K = self.shift * shift_K / (damped or 1.0)
        if not bool((target_K.abs() <= LARGEST).all()):
            raise SpecError("shift", expected="a shift whose target is a finite float32", got=self.shift)
        probe_KD = V_KD if damped else torch.zeros_like(V_KD)
        return self.law(probe_KD, target_K, V_KD, share=damped or 1.0)
