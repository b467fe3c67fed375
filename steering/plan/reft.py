"""Plan of `reft`: per block R, W and b of a trained low-rank edit of its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from steering.plan.base import MAX_RANK, Plan, is_orthonormal

Form = Literal["loreft", "direft"]
"""Whether a low-rank edit measures what it overwrites: u = Rᵀ(W h + b − R h), or adds u = Rᵀ(W h + b)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ReftPlan(Plan):
    """A low-rank edit of the outputs of n blocks.

    layers (n,) · form · rotation R (n, r, D), orthonormal rows where `is_rotation` · weight W (n, r, D) · bias b
    (n, r) · first, last: how many prompt positions it was trained on at the prompt's beginning and end; 0 and 0 where
    that is not known.
    """

    kind: ClassVar[str] = "reft"

    layers: tuple[int, ...]
    form: Form
    is_rotation: bool
    first: int
    last: int
    rotation: Tensor
    weight: Tensor
    bias: Tensor

    def _is_whole(self) -> bool:
        n, (_, r, _) = len(self.layers), self.rotation.shape
        return (
            self.are_layers(self.layers)
            and self.form in get_args(Form)
            and type(self.is_rotation) is bool
            and all(type(count) is int and 0 <= count <= 4096 for count in (self.first, self.last))
            and 0 < r <= min(self.width, MAX_RANK)
            and self.rotation.shape == self.weight.shape == (n, r, self.width)
            and self.bias.shape == (n, r)
            and (not self.is_rotation or all(is_orthonormal(R_RD) for R_RD in self.rotation))
        )
