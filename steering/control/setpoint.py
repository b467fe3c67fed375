"""Setpoints: what a user's λ means at every layer.

    β_l = origin_l + λ · scale_l            λ = (z_l − origin_l) / scale_l

    units       origin      scale       λ = 0               λ = 1
    centred     v_l·μ₋      ‖E_l‖       negative examples   positive examples
    contrast    0           ‖E_l‖       the origin          β = ‖E_l‖, as published
    absolute    0           1           the origin          β = 1 in the residual stream's own units

with E_l = μ₊ − μ₋ and v_l = E_l / ‖E_l‖. Since v_l·μ₊ = v_l·μ₋ + ‖E_l‖, `centred` puts both examples' means where the
table says, whatever common offset the stream carries; `contrast` does not, so its λ is not portable between concepts.

Source: A-LQR, arXiv:2604.19018 (`contrast`).   Oracle: the two means themselves.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from steering.errors import ControlError, DimensionMismatch, SpecError
from steering.types import Units


class Schedule(NamedTuple):
    """The affine map between λ and the projections of each layer."""

    scale_L: Tensor
    origin_L: Tensor

    def beta(self, target: float) -> Tensor:
        """β_l (L,) of a setpoint λ."""
        return self.origin_L + target * self.scale_L

    def measured(self, z_L: Tensor) -> Tensor:
        """λ of measured projections z_l = v_lᵀx_l (…, L); NaN where scale_l = 0, for no λ is measured there."""
        scale_L = torch.where(self.scale_L == 0, torch.nan, self.scale_L)
        return (z_L - self.origin_L) / scale_L


def setpoints(units: Units, offset_L: Tensor, magnitude_L: Tensor) -> Schedule:
    """The schedule of a concept in the given units.

    Args:
        units: `centred`, `contrast` or `absolute`.
        offset_L: v_l·μ₋, the mean projection of the negative examples (L,).
        magnitude_L: ‖E_l‖ ≥ 0 (L,).

    Raises:
        SpecError: unknown units.
        DimensionMismatch: the two are not vectors of one length.
        ControlError: a value is not finite, or a magnitude is negative.
    """
    if offset_L.ndim != 1 or offset_L.shape != magnitude_L.shape:
        raise DimensionMismatch(
            f"Expected offsets and magnitudes (L,), got {tuple(offset_L.shape)} and {tuple(magnitude_L.shape)}."
        )
    usable_L = torch.isfinite(offset_L) & torch.isfinite(magnitude_L) & (magnitude_L >= 0)
    if not bool(usable_L.all()):
        row = int((~usable_L).nonzero()[0])
        raise ControlError(
            f"Expected finite offsets and magnitudes of at least 0, got {float(offset_L[row])} and "
            f"{float(magnitude_L[row])} in row {row}; fit the concept again."
        )
    if units == "centred":
        return Schedule(magnitude_L, offset_L)
    if units == "contrast":
        return Schedule(magnitude_L, torch.zeros_like(offset_L))
    if units == "absolute":
        return Schedule(torch.ones_like(magnitude_L), torch.zeros_like(offset_L))
    raise SpecError("units", expected=f"one of {', '.join(get_args(Units))}", got=units)
