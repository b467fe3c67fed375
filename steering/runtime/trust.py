"""A trust region around the unsteered model (`Guard.max_kl`).

    log p_w = w · log p_steered + (1 − w) · log p_unsteered − log Z_w,      w ∈ [0, 1]

with the largest w that keeps KL(p_w ‖ p_unsteered) ≤ κ nats. Along this path, an exponential family in w, the
divergence grows with w (its derivative is w · Var_w[log p_steered − log p_unsteered] ≥ 0), so bisection finds w.
Oracle: a grid over w. Legend: B rows · V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 40
"""Halvings of the interval: w to 1e-12, below what float64 log-probabilities distinguish."""


class Mixture(NamedTuple):
    """Logits within the region, their divergence from the unsteered ones, and which rows were held back."""

    logits_BV: Tensor
    kl_B: Tensor
    is_limited_B: Tensor


def confine(steered_BV: Tensor, unsteered_BV: Tensor, kappa_B: Tensor) -> Mixture:
    """Mix two sets of logits row by row; κ in nats (B,).

    A row that needs no limit keeps its steered logits bit for bit, one with w = 0 the unsteered ones.
    """
    p_BV = steered_BV.to(torch.float64).log_softmax(-1)
    q_BV = unsteered_BV.to(torch.float64).log_softmax(-1)
    kappa_B = kappa_B.to(torch.float64)

    def mixed(w_B: Tensor) -> tuple[Tensor, Tensor]:
        logp_BV = (q_BV + w_B[:, None] * (p_BV - q_BV)).log_softmax(-1)
        return logp_BV, (logp_BV.exp() * (logp_BV - q_BV)).sum(-1).clamp_(min=0)

    low_B, high_B = torch.zeros_like(kappa_B), torch.ones_like(kappa_B)
    full_kl_B = mixed(high_B)[1]
    is_limited_B = full_kl_B > kappa_B
    for _ in range(_STEPS):
        middle_B = (low_B + high_B) / 2
        fits_B = mixed(middle_B)[1] <= kappa_B
        low_B, high_B = middle_B.where(fits_B, low_B), high_B.where(fits_B, middle_B)
    low_B = low_B.where(kappa_B > 0, 0.0)
    mixed_BV, mixed_kl_B = mixed(low_B)
    inner_BV = mixed_BV.to(steered_BV.dtype).where(low_B[:, None] > 0, unsteered_BV)
    logits_BV = inner_BV.where(is_limited_B[:, None], steered_BV)
    mixed_kl_B = mixed_kl_B.where(low_B > 0, 0.0)  # p_0 is the twin itself; computed it would be 1e-16
    return Mixture(logits_BV, mixed_kl_B.where(is_limited_B, full_kl_B), is_limited_B)
