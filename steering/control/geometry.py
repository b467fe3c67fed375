"""How many directions a set of differences has, how much of it they hold, and how surely they are the same again.

    Δ = U diag(s) Vᵀ,   p_i = s_i² / Σ s²                            rows of Δ (N, K): one difference each
    entropy rank   exp(−Σ p_i log p_i)         1 where one direction holds all, K where all hold alike
    eigengap       argmax_i s_i / s_{i+1}      counted from 1, over the directions that hold anything
    r              max(1, min(⌈entropy rank⌉, eigengap, most))
    mass           Σ_{i≤r} p_i
    stability      median over pairs of bootstraps of tr(P_i P_j) / r,   P = V_r V_rᵀ of resampled rows

Δ is not centred: a difference that all rows share is what is looked for. Two random subspaces have stability r / K.
Source: Neural FOXP2, arXiv:2602.00945, stage II; the entropy rank is Roy and Vetterli's (2007).   Oracles: numpy's
SVD, and the traces of projectors formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

SILENT = 1e-9
"""Singular values below this share of the largest hold nothing: the last gap is not one between directions."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """The leading directions of a set of differences: basis (r, K) orthonormal rows, and their figures."""

    basis: Tensor
    entropy_rank: float
    eigengap: int
    mass: float
    stability: float


def entropy_rank(s_K: Tensor) -> float:
    """exp of the entropy of s²/Σs² (K,): how many directions are in use. 0 where nothing is."""
    square_K = s_K.double().square()
    total = float(square_K.sum())
    if total == 0:
        return 0.0
    p_K = square_K / total
    return float(torch.exp(-torch.special.xlogy(p_K, p_K).sum()))


def eigengap(s_K: Tensor) -> int:
    """The number of singular values (K,), descending, before the largest ratio of neighbours; 1 where there is one."""
    s_K = s_K.double()
    s_K = s_K[s_K > SILENT * s_K[0]]
    return int((s_K[:-1] / s_K[1:]).argmax()) + 1 if len(s_K) > 1 else 1


def stability(delta_NK: Tensor, rank: int, *, bootstraps: int, seed: int) -> float:
    """Median overlap tr(P_i P_j) / r of the leading subspaces of resampled rows, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    n = len(delta_NK)
    bases = []
    for _ in range(bootstraps):
        rows = torch.randint(n, (n,), generator=generator)
        bases.append(torch.linalg.svd(delta_NK[rows].double(), full_matrices=False).Vh[:rank])
    overlaps = [float((a @ b.mT).square().sum()) / rank for a, b in combinations(bases, 2)]
    return float(torch.tensor(overlaps, dtype=torch.float64).median())


def leading(delta_NK: Tensor, *, most: int, bootstraps: int = 20, seed: int = 0) -> Subspace:
    """The leading subspace of the rows of Δ (N, K), which must not all be zero; float64. At least two bootstraps."""
    _, s_K, V_KK = torch.linalg.svd(delta_NK.double(), full_matrices=False)
    entropy, gap = entropy_rank(s_K), eigengap(s_K)
    # Rounded first: an entropy rank of exactly 2 may come out as 2 + 1e-16, which is not three directions.
    r = max(1, min(-int(-round(entropy, 9) // 1), gap, most, len(s_K)))
    square_K = s_K.square()
    return Subspace(
        V_KK[:r].contiguous(),
        entropy,
        gap,
        float(square_K[:r].sum() / square_K.sum()),
        stability(delta_NK, r, bootstraps=bootstraps, seed=seed),
    )


def best_window(score_L: list[float], layers: tuple[int, ...], *, least: int = 3, most: int = 6) -> tuple[int, ...]:
    """The run of `least` to `most` neighbouring layers whose scores sum highest; all runs that there are if shorter.

    layers: ascending, one for each score. Of equal runs the shorter and then the earlier.
    """
    runs = [
        layers[i:j]
        for i in range(len(layers))
        for j in range(i + 1, min(i + most, len(layers)) + 1)
        if layers[j - 1] - layers[i] == j - 1 - i
    ]
    longest = max(len(run) for run in runs)
    runs = [run for run in runs if len(run) >= min(least, longest)]
    score = dict(zip(layers, score_L, strict=True))
    return min(runs, key=lambda run: (-sum(score[layer] for layer in run), len(run), run))
