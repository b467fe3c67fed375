"""Plan of `linear_transport`: per block and coordinate an affine map of one class's values to the other's, bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steering.plan.base import Plan

TransportSite = Literal["resid_post", "mlp_out", "attn_out"]
"""What is transported: a block's output, that of its MLP or of its attention."""
TransportForm = Literal["linear", "mean"]
"""Scale and shift, or the shift alone."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TransportPlan(Plan):
    """z_i → ω_i z_i + b_i where low_i ≤ z_i ≤ high_i, for every coordinate of one site in n blocks.

    layers (n,) · site · form · scale ω, shift b, low, high (n, D) · control_scale, control_shift (n, D): each
    coordinate with the map of a random other one, in its own standard deviations.
    """

    kind: ClassVar[str] = "transport"

    layers: tuple[int, ...]
    site: TransportSite
    form: TransportForm
    scale: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor
    control_scale: Tensor
    control_shift: Tensor

    def _is_whole(self) -> bool:
        finite = (self.scale, self.shift, self.control_scale, self.control_shift)
        return (
            self.are_layers(self.layers)
            and self.site in get_args(TransportSite)
            and self.form in get_args(TransportForm)
            and all(t.shape == (len(self.layers), self.width) for t in (*finite, self.low, self.high))
            and all(bool(torch.isfinite(t).all()) for t in finite)
            and bool((self.scale >= 0).all() and (self.control_scale >= 0).all() and (self.low <= self.high).all())
        )
