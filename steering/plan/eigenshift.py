"""Plan of `eigenshift`: rows v_i of an orthonormal basis at the final norm, and how far the means lie apart on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from steering.plan.base import MAX_RANK, Plan, is_orthonormal

Selection = Literal["signed", "separation", "energy"]
"""How eigen-directions are chosen: see `steering.fit.eigenshift`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class EigenshiftPlan(Plan):
    """k eigen-directions of the head's WᵀW, in the order of their selection, and k random ones as the control.

    basis (k, D) orthonormal rows · sigma (k,) singular values of W, ≥ 0 · shift (k,) = v·(μ₊ − μ₋) at the final norm ·
    pooled (k,) standard deviation of v·h within the classes · control (k, D), control_shift (k,): the same for random
    eigen-directions other than the chosen ones where there are enough.
    """

    kind: ClassVar[str] = "eigenshift"

    selection: Selection
    basis: Tensor
    sigma: Tensor
    shift: Tensor
    pooled: Tensor
    control: Tensor
    control_shift: Tensor

    def _is_whole(self) -> bool:
        k = len(self.basis)
        return (
            self.selection in get_args(Selection)
            and 0 < k <= min(self.width, MAX_RANK)
            and self.basis.shape == self.control.shape == (k, self.width)
            and self.sigma.shape == self.shift.shape == self.pooled.shape == self.control_shift.shape == (k,)
            and bool((self.sigma >= 0).all() and (self.pooled >= 0).all())
            and is_orthonormal(self.basis)
            and is_orthonormal(self.control)
        )
