"""Subspaces: remove principal components of a block's input, keep only the leading ones, or filter suspicious ones.

    x' = x − a V Vᵀ (x − μ)                      rows of Vᵀ orthonormal eigenvectors of Cov(x), μ the mean of x

    remove   V = the n leading eigenvectors
    keep     V = all but the n leading ones, so that x' = μ + U_n U_nᵀ (x − μ) at a = 1: spectral truncation; n defaults
             to the spikes, the eigenvalues above the Marchenko–Pastur edge σ²(1 + √γ)², γ = D / tokens
    filter   V = the n spikes u that tell the positive examples from the negative ones the most, by |u·Δμ| / √λ;
             n defaults to those above the fit's quantile: spiked-covariance filtering

The mean stays: what is projected is x − μ, so a component's average is kept and only what varies about it goes. Leading
components of a language model carry its massive activations and truncation removes what varies little but is read, so
compare perplexity. Position 0, which later tokens lean on, is left out of `apply.prompt: all`.
Shapes: V (n, D), μ (D,).   Cost: 2·2·n·D multiply-adds per token and layer.   `max_effort` is shared out over the n.
Source: projection on principal components, after arXiv:2603.02293 (truncation); spiked covariance, Baik, Ben Arous and
Péché 2005. Not EigenShield (arXiv:2502.14976), whose score is not published.   Oracle: the projector formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.methods.planned import PlanIntervention, without_first
from steering.plan import MAX_RANK, SubspacePlan
from steering.program import Term
from steering.registry import Bench, register
from steering.types import at


@register
@dataclass(frozen=True, kw_only=True)
class Subspace(PlanIntervention):
    """Remove, keep or filter principal components of a block's input."""

    plan_kind: ClassVar[str] = SubspacePlan.kind

    type: Literal["subspace"] = "subspace"
    mode: Literal["remove", "keep", "filter"] = "remove"
    """`remove` the leading components, `keep` only them, or `filter` the spikes that tell the classes apart."""
    components: int | None = None
    """n. Null means 1 for `remove`, the spikes for `keep`, or as few more as the plan can do, and the flagged ones for
    `filter`."""
    position_0: bool = False
    """Whether `apply.prompt: all` means position 0 too."""
    control: bool = False
    """Take as many random directions away instead: what a claim has to be compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("remove", "keep", "filter"):
            raise SpecError("mode", expected="remove, keep or filter", got=self.mode)
        if self.components is not None and (not isinstance(self.components, int) or self.components < 1):
            raise SpecError("components", expected="a whole number >= 1, or null", got=self.components)

    def compile(self, bench: Bench) -> Term:
        """One law at each chosen block's input, of as many channels as components go."""
        plan = bench.plan(self.plan, SubspacePlan)
        laws = {}
        for layer in self.chosen_layers(plan.layers, bench.depth):
            row = plan.layers.index(layer)
            V_RD = self._removed(plan, row)
            if self.control and len(V_RD):
                V_RD = random_basis(V_RD, layer)
            if len(V_RD):
                laws[at("resid_pre", layer)] = self.law(V_RD, V_RD @ plan.mean[row], V_RD)
        return self.planned_term("subspace", laws, self.apply if self.position_0 else without_first(self.apply))

    def _removed(self, plan: SubspacePlan, row: int) -> Tensor:
        """The eigenvectors (n, D) that go at one block. Raises SpecError for more of them than the plan has."""
        leading, trailing = plan.leading[row], plan.trailing[row]
        if self.mode == "keep":
            most = min(len(trailing), MAX_RANK)
            kept = max(plan.spikes[row], plan.width - most) if self.components is None else self.components
            gone = plan.width - kept
            if not 0 <= gone <= most:
                raise SpecError(
                    "components",
                    expected=f"{plan.width - most} to {plan.width}, for plan {self.plan!r} can take {most} away",
                    got=kept,
                )
            return trailing[:gone]
        if self.mode == "filter":
            spikes = min(plan.spikes[row], len(leading))
            n = plan.flagged[row] if self.components is None else self.components
            if n > spikes:
                expected = f"at most {spikes}, the spikes that plan {self.plan!r} has at block {plan.layers[row]}"
                raise SpecError("components", expected=expected, got=n)
            return leading[:spikes][plan.score[row, :spikes].argsort(descending=True, stable=True)[:n]]
        n = self.components or 1
        if n > min(len(leading), MAX_RANK):
            expected = f"at most {min(len(leading), MAX_RANK)}, which plan {self.plan!r} has"
            raise SpecError("components", expected=expected, got=n)
        return leading[:n]


def random_basis(like_RD: Tensor, seed: int) -> Tensor:
    """As many random orthonormal rows (R, D), the same at every call."""
    noise_DR = torch.randn(like_RD.shape[::-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise_DR).Q.mT.to(like_RD.dtype).contiguous()
