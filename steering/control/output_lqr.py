"""Output regulation without matrices: the cost looks at one feature, so the cost-to-go has low rank.

    Q_t = q v_t v_tᵀ,   Q_L = q_f v_L v_Lᵀ,   S_t = F_tᵀ F_t   with F_t (K, D), K growing by one a layer

    F_L = [√q_f v_L]
    M   = F_{t+1} A_t                                  K vector–Jacobian products
    C Cᵀ = r I + F_{t+1} F_{t+1}ᵀ                      a K × K Cholesky factor
    w_t = F_{t+1}ᵀ (C Cᵀ)⁻¹ M v_t
    F_t = [√q v_t ;  √r C⁻¹ M]

by the Woodbury identity on (S + r I)⁻¹. A fit of L layers takes L (L + 1) / 2 products, where the Jacobians take L · D.

This is not the published controller, whose cost is Q = q I: it is the `output` cost of `riccati`, exactly.
Source: Woodbury 1950 applied to the recursion of `riccati`.   Oracle: `regulate_along(…, cost="output")`.
Algebra in float64; a product may be computed in less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steering.control.riccati import Weights, checked_directions, factor
from steering.errors import ControlError, DimensionMismatch


class OutputRegulator(NamedTuple):
    """Rank-1 gains and what they cost."""

    w_LD: Tensor
    """w_t = K_t v_t of every layer (L, D), float64."""
    products: int
    """Rows pulled back through a layer: L (L + 1) / 2 where nothing is truncated, no direction is 0 and L ≤ D."""
    discarded: float
    """Largest share of trace(S) that `max_rank` cut off at one layer, in [0, 1]; 0 is exact."""


def output_regulate(
    vjp: Callable[[int, Tensor], Tensor],
    v_LD: Tensor,
    weights: Weights,
    layers: Sequence[int],
    max_rank: int | None = None,
) -> OutputRegulator:
    """Gains w_t = K_t v_t of the `output` cost, from vector–Jacobian products alone.

    Args:
        vjp: `vjp(layer, W_KD)` returns W A_layer (K, D), the mean over prompts. Called from the last layer backward.
        v_LD: directions (L + 1, D) of the states before each controlled layer and after the last one; unit, or 0.
        weights: q, r, q_f.
        layers: the L controlled layers, consecutive and ascending, as `range(1, 8)`.
        max_rank: most rows kept of F; fewer products, and the loss is reported. None keeps all.

    Raises:
        DimensionMismatch: directions and layers do not fit, or a product has another shape than its argument.
        ControlError: layers are not consecutive, max_rank < 1, or a direction or product is not finite (layer named).
        IllConditioned: r is lost beside the cost-to-go in float64.
    """
    v_LD = checked_directions(v_LD)
    _check(v_LD, layers, max_rank)
    limit = min(max_rank or v_LD.shape[1], v_LD.shape[1])
    w_LD = torch.zeros_like(v_LD[:-1])
    products, discarded = 0, 0.0
    F_KD = _weighted_row(weights.q_f, v_LD[-1])
    for t in reversed(range(len(layers))):
        F_KD, lost = _truncate(F_KD, limit)
        discarded = max(discarded, lost)
        pulled_KD = _product(vjp, layers[t], F_KD)
        products += F_KD.shape[0]
        gram_KK = F_KD @ F_KD.T
        gram_KK.diagonal().add_(weights.r)
        C_KK = factor(gram_KK, layers[t]) if F_KD.shape[0] else gram_KK
        w_LD[t] = F_KD.T @ torch.cholesky_solve((pulled_KD @ v_LD[t])[:, None], C_KK)[:, 0]
        carried_KD = math.sqrt(weights.r) * torch.linalg.solve_triangular(C_KK, pulled_KD, upper=False)
        F_KD = torch.cat([_weighted_row(weights.q, v_LD[t]), carried_KD])
    return OutputRegulator(w_LD, products, discarded)


def _weighted_row(weight: float, v_D: Tensor) -> Tensor:
    """√weight v as a matrix of one row, or of none where it is 0: a zero row would cost a product at every layer."""
    row = math.sqrt(weight) * v_D[None]
    return row if bool(row.any()) else row[:0]


def _product(vjp: Callable[[int, Tensor], Tensor], layer: int, W_KD: Tensor) -> Tensor:
    if W_KD.shape[0] == 0:
        return W_KD
    pulled = vjp(layer, W_KD)
    if pulled.shape != W_KD.shape:
        raise DimensionMismatch(
            f"Layer {layer}: expected a product of shape {tuple(W_KD.shape)}, got {tuple(pulled.shape)}."
        )
    if not bool(torch.isfinite(pulled).all()):
        raise ControlError(
            f"Layer {layer}: a vector–Jacobian product is not finite; "
            "compute it in float32, or leave out the prompts on which the model overflows."
        )
    return pulled.to(W_KD)


def _truncate(F_KD: Tensor, limit: int) -> tuple[Tensor, float]:
    """The best `limit` rows F' for F'ᵀF' ≈ FᵀF, and the share of the trace that is lost. Rank never exceeds D."""
    if F_KD.shape[0] <= limit:
        return F_KD, 0.0
    _, sigma_K, rows_KD = torch.linalg.svd(F_KD, full_matrices=False)
    energy_K = sigma_K.square()
    lost = float(energy_K[limit:].sum() / energy_K.sum())
    return sigma_K[:limit, None] * rows_KD[:limit], lost


def _check(v_LD: Tensor, layers: Sequence[int], max_rank: int | None) -> None:
    if v_LD.shape[0] != len(layers) + 1:
        raise DimensionMismatch(
            f"{len(layers)} controlled layers need {len(layers) + 1} directions, got {v_LD.shape[0]}."
        )
    if list(layers) != list(range(layers[0], layers[0] + len(layers))):
        raise ControlError(
            f"layers: expected consecutive ascending layers, got {list(layers)[:16]}; the recursion needs every "
            "Jacobian between the first and the last.",
            param="layers",
        )
    if max_rank is not None and max_rank < 1:
        raise ControlError(f"max_rank: expected at least 1 or none, got {max_rank}.", param="max_rank")
