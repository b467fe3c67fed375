"""Plan of `sparsity`: per block and site column norms, thresholds at several levels, and a low-rank rest."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from steering.edit import Mask, Sparse
from steering.plan.base import MAX_RANK, Plan, is_orthonormal
from steering.types import Site, Tap

SparseTap = Literal["attn_in", "attn_act", "mlp_in", "mlp_act"]
"""The sites that linear maps read."""
SPARSE_TAPS: tuple[SparseTap, ...] = get_args(SparseTap)
Score = Literal["magnitude", "wina"]
"""Whether a coordinate counts by |x_i| or by |x_i| ‖W_:,i‖."""
Rule = Literal["threshold", "top_k"]
Allocation = Literal["uniform", "greedy", "cett"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsityPlan(Plan):
    """What to leave out at S sites of n blocks, at M levels of overall sparsity.

    layers (n,) · sites (S,) taps · widths (S,), W their sum: the sites of a block stand side by side in tensors of
    width W · score, rule, allocation, as fitted · target: the level that was fitted for · levels (M,) ascending ·
    size (S,) weights of the linear maps that read each site · weight (n, W) ≥ 0 · share (n, S, M) of the coordinates
    that go at each level · threshold (n, S, M) of the score · realised (n, S): share that went on the measured texts at
    the target · rest (n, K, W): top K right-singular vectors of the stacked maps of each site, K may be 0 · control
    (n, W) in [0, 1]: the random numbers by which the control chooses.
    """

    kind: ClassVar[str] = "sparsity"

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    widths: tuple[int, ...]
    size: tuple[int, ...]
    score: Score
    rule: Rule
    allocation: Allocation
    target: float
    levels: tuple[float, ...]
    weight: Tensor
    share: Tensor
    threshold: Tensor
    realised: Tensor
    rest: Tensor
    control: Tensor

    def span(self, site: int) -> slice:
        """The columns of one site in tensors of width W."""
        start = sum(self.widths[:site])
        return slice(start, start + self.widths[site])

    def at(self, sparsity: float) -> tuple[Tensor, Tensor]:
        """Shares (n, S) and thresholds (n, S) at an overall sparsity up to the last level, linear between levels."""
        i = bisect_left(self.levels, sparsity)
        low = self.levels[i - 1] if i else 0.0
        part = (sparsity - low) / (self.levels[i] - low)
        found = []
        for table in (self.share, self.threshold):
            below = table[..., i - 1] if i else torch.zeros_like(table[..., 0])
            found.append(torch.lerp(below, table[..., i], part))
        return found[0], found[1]

    def edits(
        self,
        sparsity: float,
        *,
        rule: Rule | None = None,
        control: bool = False,
        strength: float = 1.0,
        cap: float = math.inf,
    ) -> dict[Site, Sparse | Mask]:
        """What acts at each site at an overall sparsity; sites from which nothing goes are left out.

        control: as many coordinates of each site go, drawn once and the same ones for every token.
        """
        share_nS, threshold_nS = self.at(sparsity)
        found: dict[Site, Sparse | Mask] = {}
        for row, layer in enumerate(self.layers):
            for site, tap in enumerate(self.sites):
                share, columns = float(share_nS[row, site]), self.span(site)
                edit: Sparse | Mask | None
                if control:
                    edit = random_mask(self.control[row, columns], share, strength=strength, cap=cap)
                else:
                    edit = sparse(
                        self.weight[row, columns],
                        share,
                        float(threshold_nS[row, site]),
                        rule or self.rule,
                        self.rest[row][:, columns],
                        strength=strength,
                        cap=cap,
                    )
                if edit is not None:
                    found[Site(cast("Tap", tap), layer)] = edit
        return found

    def _is_whole(self) -> bool:
        n, S, M, W = len(self.layers), len(self.sites), len(self.levels), sum(self.widths)
        rises = all(a < b for a, b in pairwise((0.0, *self.levels)))
        return (
            self.are_layers(self.layers)
            and S > 0
            and self.sites == tuple(tap for tap in SPARSE_TAPS if tap in self.sites)
            and len(self.widths) == len(self.size) == S
            and all(type(size) is int and size > 0 for size in (*self.widths, *self.size))
            and all(w == self.width for tap, w in zip(self.sites, self.widths, strict=True) if tap.endswith("_in"))
            and self.score in get_args(Score)
            and self.rule in get_args(Rule)
            and self.allocation in get_args(Allocation)
            and M > 0
            and all(type(level) is float for level in self.levels)
            and rises
            and self.levels[-1] <= 1
            and self.target in self.levels
            and self.weight.shape == self.control.shape == (n, W)
            and self.share.shape == self.threshold.shape == (n, S, M)
            and self.realised.shape == (n, S)
            and self.rest.ndim == 3
            and self.rest.shape[::2] == (n, W)
            and self.rest.shape[1] <= min(MAX_RANK, *self.widths)
            and bool((self.weight >= 0).all() and torch.isfinite(self.weight).all())
            and all(bool(((t >= 0) & (t <= 1)).all()) for t in (self.share, self.realised, self.control))
            and bool((self.threshold >= 0).all() and torch.isfinite(self.threshold).all())
            and bool((self.share.diff(dim=-1) >= 0).all() and (self.threshold.diff(dim=-1) >= 0).all())
            and all(is_orthonormal(rest[:, self.span(site)]) for rest in self.rest for site in range(S))
        )


def sparse(
    weight_E: Tensor,
    share: float,
    threshold: float,
    rule: Rule,
    rest_KE: Tensor,
    *,
    strength: float = 1.0,
    cap: float = math.inf,
) -> Sparse | None:
    """The edit that leaves out `share` of a site's coordinates; None where that is not one of them.

    `top_k` keeps one at least, for a count of 0 stands for the threshold.
    """
    width = len(weight_E)
    count = max(1, round(width * (1 - share))) if rule == "top_k" else 0
    if share <= 0 or count == width:
        return None
    return Sparse.of(weight_E, threshold=threshold, count=count, rest=rest_KE, strength=strength, cap=cap)


def random_mask(number_E: Tensor, share: float, *, strength: float = 1.0, cap: float = math.inf) -> Mask | None:
    """The mask that leaves out the coordinates with the smallest random numbers; None where there are none."""
    gone = round(len(number_E) * share)
    if gone == 0:
        return None
    scale_E = torch.ones_like(number_E)
    scale_E[number_E.argsort(stable=True)[:gone]] = 0.0
    return Mask.of(scale_E, strength=strength, cap=cap)
