"""Bounded effort: how much control one token may receive, at a layer and in sum. Defines the kernel's rule in float64.

At a layer with state x, raw controls ũ_j = a_j e_j along rows g_j, caps c_j and a budget of which `spent` is gone:

    avail = max(budget − spent, 0)
    |ũ_j| ‖g_j‖ ≤ min(c_j, avail) ‖x‖         each channel shrinks alone, so one cannot take another's cap
    u = Σ_j ũ_j g_j,   ρ = ‖u‖ / ‖x‖
    ρ > avail  ⇒  u ← u · avail / ρ           the sum shrinks as a whole and keeps its direction
    spent ← spent + ρ

Effort is relative to the state, ‖u‖/‖x‖, so that one number means the same at every layer. With one channel a step
is the Euclidean projection on the ball of radius min(c, avail) ‖x‖.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steering.errors import ControlError, DimensionMismatch

_TINY = float(torch.finfo(torch.float32).tiny)
"""Least ‖x‖ that a relative effort divides by: the smallest normal number of the kernel's float32."""


class Spending(NamedTuple):
    """A control within its bounds."""

    u: Tensor
    """The control: (E,) of a layer, (L, E) of a sequence."""
    effort: Tensor
    """‖u‖ / ‖x‖: () of a layer, (L,) of a sequence."""
    saturated: Tensor
    """Whether a cap or the budget changed the control; bool, shaped as `effort`."""


def spend(raw_R: Tensor, gain_RE: Tensor, state_norm: float, cap_R: Tensor, avail: float = math.inf) -> Spending:
    """The control of one token at one layer, within its caps and what is left of its budget.

    Args:
        raw_R: strength × error of every channel (R,); may be infinite where its cap or `avail` is finite.
        gain_RE: rows g_j (R, E).
        state_norm: ‖x‖ ≥ 0 of the state that the law reads.
        cap_R: most ‖ũ_j g_j‖ / ‖x‖ of every channel (R,), +inf for none.
        avail: what is left of the budget, +inf for none; below 0 counts as 0.

    Raises:
        DimensionMismatch: channels differ in number.
        ControlError: a cap or the state's norm is negative or NaN, or `avail` is NaN.
    """
    if gain_RE.ndim != 2 or raw_R.shape != gain_RE.shape[:1] or cap_R.shape != raw_R.shape:
        raise DimensionMismatch(
            f"Expected controls (R,), gains (R, E) and caps (R,), got {tuple(raw_R.shape)}, {tuple(gain_RE.shape)} "
            f"and {tuple(cap_R.shape)}."
        )
    if not bool((cap_R >= 0).all()) or not state_norm >= 0 or math.isnan(avail):
        raise ControlError("Expected caps and a state norm of at least 0 and a budget that is a number.")
    raw_R, gain_RE, cap_R = (tensor.to(torch.float64) for tensor in (raw_R, gain_RE, cap_R))
    avail = max(avail, 0.0)
    cap_R = cap_R.clamp(max=avail)
    norm_R = gain_RE.norm(dim=1)
    # 0 / 0 and inf · 0 have a meaning here: a channel without a gain spends nothing, no cap is no bound
    bound_R = torch.where((norm_R == 0) | cap_R.isinf(), torch.inf, cap_R * state_norm / norm_R)
    bounded_R = raw_R.clamp(-bound_R, bound_R)
    u_E = torch.where(norm_R == 0, 0.0, bounded_R) @ gain_RE
    effort = u_E.norm() / max(state_norm, _TINY)
    saturated = ((raw_R.abs() > bound_R).any()) | (effort > avail)
    if float(effort) > avail:
        u_E = u_E * (avail / effort)
        effort = torch.full_like(effort, avail)
    return Spending(u_E, effort, saturated)


def project(
    raw_LR: Tensor, gain_LRE: Tensor, state_norm_L: Tensor, cap_LR: Tensor, budget: float = math.inf
) -> Spending:
    """The controls of one token through its layers, first come first served from one budget.

    Args:
        raw_LR: strength × error (L, R).
        gain_LRE: gains (L, R, E).
        state_norm_L: ‖x_l‖ (L,).
        cap_LR: caps (L, R), +inf for none.
        budget: most Σ_l ‖u_l‖ / ‖x_l‖, +inf for none.

    Raises:
        DimensionMismatch, ControlError: as `spend`, or the numbers of layers differ.
    """
    if len({len(raw_LR), len(gain_LRE), len(state_norm_L), len(cap_LR)}) != 1 or len(raw_LR) == 0:
        raise DimensionMismatch(
            f"Expected one number of layers, at least 1, got {len(raw_LR)}, {len(gain_LRE)}, {len(state_norm_L)} "
            f"and {len(cap_LR)}."
        )
    spent, steps = 0.0, []
    for raw_R, gain_RE, state_norm, cap_R in zip(raw_LR, gain_LRE, state_norm_L.tolist(), cap_LR, strict=True):
        step = spend(raw_R, gain_RE, state_norm, cap_R, budget - spent)
        spent += float(step.effort)
        steps.append(step)
    return Spending(*(torch.stack(parts) for parts in zip(*steps, strict=True)))
