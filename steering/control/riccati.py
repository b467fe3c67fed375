"""The linear-quadratic regulator of a network whose layers are time: backward Riccati recursion with B = I.

    x_{t+1} = A_t x_t + u_t          u_t = K_t (r − x_t)
    J = Σ_t (x_tᵀ Q_t x_t + r ‖u_t‖²) + x_Lᵀ Q_L x_L

    S_L = Q_L
    P_t = S_{t+1} + r I
    K_t = P_t⁻¹ S_{t+1} A_t
    S_t = Q_t + A_tᵀ S_{t+1} A_t − (S_{t+1} A_t)ᵀ K_t  =  Q_t + r A_tᵀ K_t

The last form is the one computed: A − K = r P⁻¹ A, so nothing is subtracted and S stays positive when r is small.
Two costs, never to be confused: `state` is the published one, Q = q I and Q_L = q_f I; `output` looks at the feature
alone, Q_t = q v_t v_tᵀ and Q_L = q_f v_L v_Lᵀ (`output_lqr` solves the same problem without forming any matrix).

The run-time law needs only w_t = K_t v_t, for K_t (β − v_tᵀx) v_t = (β − v_tᵀx) w_t: two dot products a token.

Source: Bertsekas, Dynamic Programming and Optimal Control, vol. 1, §3.1 (time-varying LQR); A-LQR, arXiv:2604.19018.
Oracle: least squares over the horizon; `scipy.linalg.solve_discrete_are(A, I, q I, r I)` as L → ∞; `control.dlqr`.
Memory: O(D²) whatever L; time O(L D³). Everything in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steering.errors import ControlError, DimensionMismatch, IllConditioned, echo

Cost = Literal["state", "output"]
"""`state` Q = q I, the published controller · `output` Q = q v vᵀ, the feature alone."""

_CONDITION_LIMIT = 1e14
"""Above it float64 (1.1e-16) leaves less than two digits of a gain."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What the regulator minimises. Only the ratios q : r : q_f matter.

    Raises:
        ControlError: a weight is not a finite number, r ≤ 0, q or q_f is negative, or both of them are 0.
    """

    q: float = 1.0
    """Price of the error at every controlled layer's input."""
    r: float = 1.0
    """Price of the control."""
    q_f: float = 1.0
    """Price of the error after the last controlled layer."""

    def __post_init__(self) -> None:
        for name in ("q", "r", "q_f"):
            value = getattr(self, name)
            expected = "a finite number above 0" if name == "r" else "a finite number of at least 0"
            is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (name == "r" and value == 0):
                raise ControlError(f"{name}: expected {expected}, got {echo(value)}.", param=name)
        if self.q == 0 and self.q_f == 0:
            raise ControlError("q: expected q or q_f above 0, got both 0, for which every gain is 0.", param="q")


class Regulator(NamedTuple):
    """Dense gains of every layer and the cost-to-go of the first state: J* = x_0ᵀ S x_0."""

    K_LDD: Tensor
    S_DD: Tensor


def riccati(
    A: Iterable[Tensor], weights: Weights, v_LD: Tensor | None = None, *, last_layer: int = -1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the recursion over Jacobians that arrive last layer first, keeping none of them.

    Args:
        A: layer Jacobians (D, D), A[i, j] = ∂f_i/∂x_j, from the last controlled layer backward.
        weights: q, r, q_f.
        v_LD: directions (L + 1, D) of the states; given, the cost is `output`, else `state`.
        last_layer: number of the first matrix to arrive, for messages; −1 counts from the end.

    Yields:
        K_t (D, D) and S_t (D, D), t = L − 1 … 0, float64 on the device of A.

    Raises:
        DimensionMismatch: a Jacobian is not square or of another width, or there is not one for each layer of v.
        ControlError: a Jacobian or direction holds a value that is not finite; the layer is named.
        IllConditioned: S + r I cannot be factored to any accuracy.
    """
    if v_LD is not None:
        v_LD = checked_directions(v_LD)
    S: Tensor | None = None
    step = 0
    for A_t in A:
        layer = last_layer - step
        if v_LD is not None and step >= v_LD.shape[0] - 1:
            raise DimensionMismatch(
                f"{v_LD.shape[0]} directions need {v_LD.shape[0] - 1} Jacobians, one for each layer; got more."
            )
        v_t, v_next = (None, None) if v_LD is None else (v_LD[-2 - step], v_LD[-1 - step])
        A_DD = _checked_jacobian(A_t, S if S is not None else v_next, layer)
        del A_t  # the caller's copy may go before the next one is made
        if S is None:
            S = _cost(weights.q_f, v_next, A_DD)
        P = S.clone()
        P.diagonal().add_(weights.r)
        K = torch.cholesky_solve(S @ A_DD, factor(P, layer))
        S = A_DD.T @ K
        S.mul_(weights.r).add_(_cost(weights.q, v_t, A_DD))
        S = (S + S.T) / 2  # rounding alone makes it lopsided, and over many layers the lopsided part grows
        del A_DD, P
        yield K, S
        del K
        step += 1
    if v_LD is not None and step != v_LD.shape[0] - 1:
        raise DimensionMismatch(
            f"{v_LD.shape[0]} directions need {v_LD.shape[0] - 1} Jacobians, one for each layer; got {step}."
        )


def regulate(A_LDD: Tensor, weights: Weights, *, last_layer: int = -1) -> Regulator:
    """All gains of the `state` cost at once, O(L D²) memory: for analysis and small models.

    Args:
        A_LDD: Jacobians (L, D, D) in the order of the layers.

    Raises:
        DimensionMismatch, ControlError, IllConditioned: as `riccati`.
    """
    if A_LDD.ndim != 3 or A_LDD.shape[0] == 0:
        raise DimensionMismatch(f"Expected Jacobians (L, D, D) with L ≥ 1, got shape {tuple(A_LDD.shape)}.")
    gains: list[Tensor] = []
    for K, S in riccati(reversed(A_LDD.unbind()), weights, last_layer=last_layer):
        gains.append(K)
        S_DD = S
    return Regulator(torch.stack(gains[::-1]), S_DD)


def regulate_along(
    A: Iterable[Tensor], v_LD: Tensor, weights: Weights, cost: Cost = "state", *, last_layer: int = -1
) -> Tensor:
    """The rank-1 form: w_t = K_t v_t of every layer, from streamed Jacobians; no K is kept.

    Args:
        A: layer Jacobians (D, D), last controlled layer first, L of them.
        v_LD: directions (L + 1, D) of the states before each controlled layer and after the last one; unit, or 0
            where the feature is not defined (its gain is then 0).
        cost: `state`, the published controller, or `output`, the oracle of `output_regulate`.

    Returns:
        w_LD (L, D), float64.

    Raises:
        DimensionMismatch, ControlError, IllConditioned: as `riccati`.
    """
    if cost not in get_args(Cost):
        raise ControlError(f"cost: expected one of {', '.join(get_args(Cost))}, got {echo(cost)}.", param="cost")
    v_LD = checked_directions(v_LD)
    n_layers = v_LD.shape[0] - 1
    rows: list[Tensor] = []
    for K, S in riccati(A, weights, v_LD if cost == "output" else None, last_layer=last_layer):
        if len(rows) == n_layers or K.shape[0] != v_LD.shape[1]:
            raise DimensionMismatch(
                f"Directions {tuple(v_LD.shape)} need {n_layers} Jacobians of width {v_LD.shape[1]}, "
                f"got more, or one of width {K.shape[0]}."
            )
        rows.append(K @ v_LD[n_layers - 1 - len(rows)].to(K.device))
        del K, S  # neither outlives its layer while the next Jacobian is being computed
    if len(rows) != n_layers:
        raise DimensionMismatch(f"{v_LD.shape[0]} directions need {n_layers} Jacobians, got {len(rows)}.")
    return torch.stack(rows[::-1])


def factor(P: Tensor, layer: int) -> Tensor:
    """Lower Cholesky factor of a positive definite P.

    Raises:
        IllConditioned: P is not positive definite in float64, or its condition number is certainly above 1e14.
    """
    C: Tensor
    C, info = torch.linalg.cholesky_ex(P)
    diagonal = C.diagonal()
    # the squared ratio of a factor's diagonal entries is a lower bound on the condition number, for O(D)
    condition = float((diagonal.max() / diagonal.min()) ** 2) if int(info) == 0 else math.inf
    if not condition <= _CONDITION_LIMIT:
        raise IllConditioned(
            f"Layer {layer}: S + r I has a condition number of {condition:.1e} or more, above {_CONDITION_LIMIT:.0e}; "
            "raise r, or leave out the layers whose Jacobian is very large (layer 0 usually is)."
        )
    return C


def checked_directions(v_LD: Tensor) -> Tensor:
    """Directions (L + 1, D) as float64.

    Raises:
        DimensionMismatch: not a matrix of at least two rows.
        ControlError: a value is not finite; the row is named.
    """
    if v_LD.ndim != 2 or v_LD.shape[0] < 2 or v_LD.shape[1] == 0:
        raise DimensionMismatch(
            f"Expected directions (L + 1, D), one for each controlled layer's input and one for the last output, "
            f"got shape {tuple(v_LD.shape)}."
        )
    finite_rows = torch.isfinite(v_LD).all(dim=1)
    if not bool(finite_rows.all()):
        row = int((~finite_rows).nonzero()[0])
        raise ControlError(f"Direction {row} of {v_LD.shape[0]} holds a value that is not finite; fit it again.")
    return v_LD.to(torch.float64)


def _checked_jacobian(A: Tensor, like: Tensor | None, layer: int) -> Tensor:
    width = A.shape[-1] if like is None else like.shape[-1]
    if A.ndim != 2 or tuple(A.shape) != (width, width):
        raise DimensionMismatch(f"Layer {layer}: expected a Jacobian ({width}, {width}), got shape {tuple(A.shape)}.")
    if not bool(torch.isfinite(A).all()):
        raise ControlError(
            f"Layer {layer}: the Jacobian holds a value that is not finite; "
            "compute it in float32 or float64, or leave out the prompts on which the model overflows."
        )
    return A.to(torch.float64)


def _cost(weight: float, v_D: Tensor | None, like_DD: Tensor) -> Tensor:
    if v_D is None:
        return torch.eye(like_DD.shape[0], dtype=like_DD.dtype, device=like_DD.device).mul_(weight)
    v_D = v_D.to(like_DD.device)
    return torch.outer(v_D, v_D).mul_(weight)
