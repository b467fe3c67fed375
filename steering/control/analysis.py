"""What a regulator does: the closed loop, its growth, its prediction, and the gains that need no Jacobian.

    closed loop     Ã_t = A_t − K_t,   Φ = Ã_{L−1} … Ã_0
    rank-1 loop     x_{t+1} = A_t x_t + (β_t − v_tᵀ x_t) w_t
    A = I, `state`  s_L = q_f,  g_t = s_{t+1} / (s_{t+1} + r),  s_t = q + r g_t,  K_t = g_t I

so the last gain is q_f / (q_f + r), and many layers before it s solves s² − q s − q r = 0: s = (q + √(q² + 4 q r)) / 2.

Source: A-LQR, arXiv:2604.19018 (tracking error through the closed loop).   Oracle: `riccati` with A = I; a step-by-step
product; numpy's eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from steering.control.output_lqr import output_regulate
from steering.control.riccati import Cost, Weights, checked_directions
from steering.errors import ControlError, DimensionMismatch, echo


class Trajectory(NamedTuple):
    """A predicted run of the linear closed loop."""

    x_LD: Tensor
    """States (L + 1, D)."""
    u_LD: Tensor
    """Controls (L, D)."""
    z_L: Tensor
    """Feature v_tᵀ x_t of every state that has a direction (L + 1,) or (L,), as many as `v_LD` has rows."""


def closed_loop(A_LDD: Tensor, K_LDD: Tensor) -> Tensor:
    """Ã_t = A_t − K_t (L, D, D): what is left of a deviation after one controlled layer.

    Raises:
        DimensionMismatch: the shapes differ.
    """
    if A_LDD.ndim != 3 or A_LDD.shape != K_LDD.shape:
        raise DimensionMismatch(
            f"Expected Jacobians and gains (L, D, D), got {tuple(A_LDD.shape)} and {tuple(K_LDD.shape)}."
        )
    return A_LDD - K_LDD


def transition(A_LDD: Tensor) -> Tensor:
    """Φ = A_{L−1} … A_1 A_0 (D, D): a deviation at the first layer's input, seen after the last layer."""
    Phi_DD = torch.eye(A_LDD.shape[-1], dtype=A_LDD.dtype, device=A_LDD.device)
    for A_DD in A_LDD:
        Phi_DD = A_DD @ Phi_DD
    return Phi_DD


def spectral_radius(A: Tensor) -> Tensor:
    """Largest |λ_i(A)| of square matrices (…, D, D) → (…). A is not symmetric: no symmetric solver here."""
    radius: Tensor = torch.linalg.eigvals(A).abs().amax(dim=-1)
    return radius


def scalar_gains(n_layers: int, weights: Weights) -> Tensor:
    """Gains g_t of the `state` cost where every block is the identity, so K_t = g_t I (L,), float64.

    Raises:
        ControlError: fewer than one layer.
    """
    if n_layers < 1:
        raise ControlError(f"n_layers: expected at least 1, got {n_layers}.", param="n_layers")
    gains, s = [], float(weights.q_f)
    for _ in range(n_layers):
        g = s / (s + weights.r)
        gains.append(g)
        s = weights.q + weights.r * g
    return torch.tensor(gains[::-1], dtype=torch.float64)


def identity_gains(v_LD: Tensor, weights: Weights, cost: Cost = "state") -> Tensor:
    """Rank-1 gains w_t with A = I: no Jacobian, no model. `state`: w_t = g_t v_t; `output`: by the low-rank recursion.

    Args:
        v_LD: directions (L + 1, D) of the states before each controlled layer and after the last one.

    Returns:
        w_LD (L, D), float64.

    Raises:
        DimensionMismatch, ControlError: as `checked_directions`; an unknown cost.
    """
    v_LD = checked_directions(v_LD)
    n_layers = v_LD.shape[0] - 1
    if cost == "state":
        return scalar_gains(n_layers, weights).to(v_LD.device)[:, None] * v_LD[:-1]
    if cost == "output":
        return output_regulate(lambda _, W_KD: W_KD, v_LD, weights, range(n_layers)).w_LD
    raise ControlError(f"cost: expected one of {', '.join(get_args(Cost))}, got {echo(cost)}.", param="cost")


def simulate(A_LDD: Tensor, v_LD: Tensor, w_LD: Tensor, beta_L: Tensor, x_D: Tensor) -> Trajectory:
    """Predict the rank-1 closed loop on a linear plant, from a state before the first controlled layer.

    For the deviation from a nominal run x̄_t of the network, pass δ_0 for x and β_t − v_tᵀ x̄_t for β.

    Args:
        A_LDD: Jacobians (L, D, D), first layer first.
        v_LD: directions (L, D), or (L + 1, D) to read the feature after the last layer too.
        w_LD: gains (L, D); zeros give the open loop.
        beta_L: setpoints (L,), or (L + 1,) of which the last is not used.
        x_D: first state (D,).

    Raises:
        DimensionMismatch: the shapes do not fit.
    """
    n_layers, width = A_LDD.shape[0], A_LDD.shape[-1]
    fits = (
        A_LDD.shape == (n_layers, width, width)
        and v_LD.shape in ((n_layers, width), (n_layers + 1, width))
        and w_LD.shape == (n_layers, width)
        and beta_L.shape in ((n_layers,), (n_layers + 1,))
        and x_D.shape == (width,)
    )
    if not fits:
        shapes = [tuple(tensor.shape) for tensor in (A_LDD, v_LD, w_LD, beta_L, x_D)]
        raise DimensionMismatch(f"Expected A (L, D, D), v, w (L, D), β (L,) and x (D,), got {shapes}.")
    states, controls = [x_D], []
    for A_DD, v_D, w_D, beta in zip(A_LDD, v_LD, w_LD, beta_L, strict=False):
        u_D = (beta - v_D @ states[-1]) * w_D
        controls.append(u_D)
        states.append(A_DD @ states[-1] + u_D)
    x_LD = torch.stack(states)
    return Trajectory(x_LD, torch.stack(controls), (v_LD * x_LD[: len(v_LD)]).sum(dim=1))
