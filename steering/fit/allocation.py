"""How a sparsity is shared out over the sites of a model: alike, greedily (TEAL), or at one tail error (CETT).

    size_p           weights of the linear maps that read site p;   overall s = Σ_p size_p s_p / Σ_p size_p
    greedy           while s < most: raise the one s_p by step · min(size) / size_p whose block output moves the least;
                     every step takes the same number of weights away
    CETT(t) = mean over tokens of ‖W h_tail‖ / ‖W h‖,   h_tail = h where |h_i| ‖W_:,i‖ ≤ t, else 0
    t_l(c)  = the largest t of block l up to which its CETT stays within c: one c for all blocks

All three are paths u ↦ s_p(u) that only rise, from nothing to all. A path is walked by bisection, to an overall
sparsity or to a perplexity.
Source: TEAL, arXiv:2408.14690, Algorithm 1 (greedy); Sparsing Law, arXiv:2411.02335 (CETT and PPL-p%).
Oracle: every allocation of a small separable problem; the tail formed explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Path = Callable[[float], Tensor]
"""u in [0, 1] → shares (n, S) float64, that only rise with u."""

CEILING = 0.99
"""Largest share that the greedy allocation takes from a site."""


def uniform(n: int, sites: int) -> Path:
    """The same share everywhere."""
    return lambda u: torch.full((n, sites), u, dtype=torch.float64)


def greedy_steps(error: Callable[[Tensor], float], size_S: Tensor, *, step: float, most: float) -> Tensor:
    """Shares (steps + 1, S) of one block, from none until the overall sparsity is `most` < CEILING.

    error: how far the block's output moves at given shares (S,). step: how much the smallest site is raised at a time.
    """
    weight_S = size_S.double() / size_S.double().sum()
    rise_S = step * weight_S.min() / weight_S
    share_S = torch.zeros_like(weight_S)
    path = [share_S]
    while float(share_S @ weight_S) < most - 1e-9:
        trials = []
        for p in (share_S < CEILING - 1e-9).nonzero()[:, 0].tolist():
            trials.append(share_S.clone())
            trials[-1][p] = (share_S[p] + rise_S[p]).clamp_max(CEILING)
        errors = [error(tried_S) for tried_S in trials]
        # An error that is no number is worse than any.
        share_S = min(zip(errors, trials, strict=True), key=lambda t: t[0] if math.isfinite(t[0]) else math.inf)[1]
        path.append(share_S)
    return torch.stack(path)


def along_steps(steps: list[Tensor], size_S: Tensor) -> Path:
    """The path through the greedy steps of each block, u the block's overall sparsity."""
    weight_S = size_S.double() / size_S.double().sum()
    overall = [(path @ weight_S).numpy() for path in steps]

    def at(u: float) -> Tensor:
        rows = [
            [np.interp(u, known, path[:, p].numpy()) for p in range(path.shape[1])]
            for known, path in zip(overall, steps, strict=True)
        ]
        return torch.tensor(np.array(rows), dtype=torch.float64)

    return at


def tail_errors(h_TE: Tensor, W_OE: Tensor, threshold_G: Tensor) -> Tensor:
    """CETT (G,) at ascending thresholds, made to rise: the largest up to each, for cancellation can lower it."""
    score_TE = h_TE.abs() * W_OE.norm(dim=0)
    whole_T = (h_TE @ W_OE.mT).norm(dim=-1).clamp_min(torch.finfo(h_TE.dtype).tiny)
    errors = []
    for threshold in threshold_G:
        tail_TO = h_TE.masked_fill(score_TE > threshold, 0.0) @ W_OE.mT
        errors.append((tail_TO.norm(dim=-1) / whole_T).mean())
    return torch.stack(errors).cummax(0).values


def along_tails(error_nG: Tensor, share_G: Tensor) -> Path:
    """The path of one site at one CETT for all blocks, from tables (n, G) of their CETT at ascending shares (G,)."""
    # Where an error stands still, the share goes on: a jump would leave levels without a CETT of their own.
    known = (error_nG.double() + 1e-9 * share_G.double()).numpy()
    shares = share_G.double().numpy()

    def at(u: float) -> Tensor:
        rows = [float(np.interp(u * (1 + 1e-9), table, shares, left=0.0)) for table in known]
        return torch.tensor(rows, dtype=torch.float64)[:, None]

    return at


def overall(share_nS: Tensor, size_S: Tensor) -> float:
    """Share of the weights that need not be read, all blocks alike."""
    return float((share_nS.double().mean(0) @ size_S.double()) / size_S.double().sum())


def bisect(value: Callable[[float], float], aim: float, *, steps: int, tolerance: float) -> tuple[float, float]:
    """u in [0, 1] with value(u) = aim for a value that rises, and what it was there.

    Ends within `tolerance` of the aim or after `steps`. The end of [0, 1] that is nearer where the aim is not reached.
    """
    low, high = 0.0, 1.0
    u, found = 1.0, value(1.0)
    if found <= aim:
        return u, found
    for _ in range(steps):
        u = (low + high) / 2
        found = value(u)
        if abs(found - aim) <= tolerance:
            break
        low, high = (u, high) if found < aim else (low, u)
    return u, found
