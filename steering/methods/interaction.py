"""Interaction: remove features of the local interaction basis at a block's input, or keep only the leading ones.

    x' = x − a Σ_j f̂_j c⁺_j,      f̂_j = c_j·(x − μ)           c_j columns of C, c⁺_j rows of C⁺, c_j·c⁺_k = δ_jk

    remove   j = the first n features, those through which the stream moves what comes behind it the most
    keep     j = the trailing ones, so that the first n stay; n defaults to what is left when all stored ones go

The basis is oblique: features are uncorrelated, C⁺ is not Cᵀ, and what a removal takes away is not a projection at
right angles. The mean stays. With `control` the same number of principal components goes instead: for language models
the authors of the basis find no substantial gain over them, so compare the two.
Shapes: c, c⁺ (n, D), μ (D,).   Cost: 2·2·n·D multiply-adds per token and layer. `max_effort` is shared out over the
n features.
Source: Local Interaction Basis, arXiv:2405.10928, Sec. 3 and its ablations.   Oracle: C_kept C⁺_kept formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from steering.errors import SpecError
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import InteractionPlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class Interaction(PlanIntervention):
    """Remove features of the local interaction basis, or keep only the leading ones."""

    plan_kind: ClassVar[str] = InteractionPlan.kind

    type: Literal["interaction"] = "interaction"
    mode: Literal["remove", "keep"] = "remove"
    """`remove` features, or `keep` the leading ones, whose trailing rest goes."""
    components: int | tuple[int, ...] | None = None
    """For `remove` how many of the first, 1 if null, or the numbers of some of them, counted from 0; for `keep` how
    many stay, null for all but those stored from the end."""
    control: bool = False
    """Take away as many principal components instead, from the same end: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("remove", "keep"):
            raise SpecError("mode", expected="remove or keep", got=self.mode)
        chosen = self.components
        if isinstance(chosen, tuple):
            if self.mode == "keep" or not chosen or not all(type(n) is int and n >= 0 for n in chosen):
                raise SpecError("components", expected="numbers >= 0, for `remove` only", got=list(chosen))
        elif chosen is not None and (type(chosen) is not int or chosen < 1):
            raise SpecError("components", expected="a whole number >= 1, numbers of features, or null", got=chosen)

    def compile(self, bench: Bench) -> Term:
        """One law at each chosen block's input, of as many channels as features go."""
        plan = bench.plan(self.plan, InteractionPlan)
        laws = {}
        for layer in self.chosen_layers(plan.layers, bench.depth):
            row = plan.layers.index(layer)
            probe_RD, gain_RD = self._removed(plan, row)
            if len(probe_RD):
                setpoint_R = probe_RD @ plan.mean[row]
                law = self.law(probe_RD, setpoint_R, gain_RD, orthonormal=self.control)
                laws[at("resid_pre", layer)] = law
        return self.planned_term("interaction", laws, without_first(self.apply))

    def _removed(self, plan: InteractionPlan, row: int) -> tuple[Tensor, Tensor]:
        """Probes and gains (n, D) of what goes at one block. Raises SpecError for what the plan does not have."""
        if self.mode == "keep":
            rank, most = plan.ranks[row], plan.probe_rest.shape[1]
            kept = rank - most if self.components is None else self.components
            if not isinstance(kept, int) or not rank - most <= kept <= rank:
                expected = f"{rank - most} to {rank}, for plan {self.plan!r} can take {most} away"
                raise SpecError("components", expected=expected, got=kept)
            gone = slice(rank - kept)
            rest = plan.pca_rest[row, gone]
            return (rest, rest) if self.control else (plan.probe_rest[row, gone], plan.gain_rest[row, gone])
        most = plan.probe.shape[1]
        chosen = 1 if self.components is None else self.components
        rows = list(range(chosen)) if isinstance(chosen, int) else sorted(set(chosen))
        if rows[-1] >= most:
            raise SpecError("components", expected=f"at most {most}, which plan {self.plan!r} has", got=self.components)
        first = plan.pca[row, rows]
        return (first, first) if self.control else (plan.probe[row, rows], plan.gain[row, rows])
