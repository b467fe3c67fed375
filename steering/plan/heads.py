"""Plan of `heads`: for every attention head the direction that tells the classes apart, how well, and its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steering.plan.base import MAX_RANK, Plan

HeadProbe = Literal["mean_difference", "logistic"]
"""Which direction a head gets: see `steering.fit.heads`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadsPlan(Plan):
    """All H heads, of width d, of n blocks.

    layers (n,) · probe · accuracy (n, H) of the classifier along θ · direction θ (n, H, d), unit rows, zero where the
    classes do not differ · deviation σ (n, H) of θ·x over all examples · positive, negative (n, H) the class means of
    θ·x · mean (n, H, d) of x · order (n·H,) the heads, numbered row by row, best first · control
    (n·H,) the same heads shuffled. The two orders are whole numbers in float32.
    """

    kind: ClassVar[str] = "heads"

    layers: tuple[int, ...]
    probe: HeadProbe
    accuracy: Tensor
    direction: Tensor
    deviation: Tensor
    positive: Tensor
    negative: Tensor
    mean: Tensor
    order: Tensor
    control: Tensor

    def _is_whole(self) -> bool:
        n, (_, H, d) = len(self.layers), self.direction.shape
        length_NH = self.direction.norm(dim=-1)
        return (
            self.are_layers(self.layers)
            and self.probe in get_args(HeadProbe)
            and 0 < H <= MAX_RANK
            and d > 0
            and self.direction.shape == self.mean.shape == (n, H, d)
            and all(t.shape == (n, H) for t in (self.accuracy, self.deviation, self.positive, self.negative))
            and bool(((length_NH == 0) | ((length_NH - 1).abs() <= 1e-3)).all())
            and bool(((self.accuracy >= 0) & (self.accuracy <= 1) & (self.deviation >= 0)).all())
            and all(bool(torch.isfinite(t).all()) for t in (self.positive, self.negative, self.mean))
            and self.order.shape == self.control.shape == (n * H,)
            and all(sorted(order.tolist()) == list(range(n * H)) for order in (self.order, self.control))
        )
