"""Plan of `neurons`: single units of a site, best first, with their class statistics, and random units beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steering.plan.base import Plan

NeuronSite = Literal["mlp_act", "mlp_out", "resid_post"]
"""Where units are coordinates: the MLP's hidden layer, its output, the block's output."""
NeuronScore = Literal["auroc", "mean_difference", "sensitivity"]
"""By what units are chosen: see `steering.fit.neurons`."""
MAX_UNITS = 65_536
"""Most units of a plan."""
MAX_MASSIVE = 2**20
"""Most units of a plan that are never touched."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronsPlan(Plan):
    """M units of one site over n blocks, in the order of their choice. Whole numbers are kept in float32 too.

    layers (n,) and spans (n,) the site's width there · layer, index (M,) where a unit is · score (M,) what it was
    chosen by · auroc (M,) that of the positive class · positive, negative (M,) means over each class's tokens ·
    deviation (M,) within the classes · control (M,) a random unit of the same block for each, control_negative (M,) its
    mean over the negative class · massive (N, 2) block and index of the units that are never touched.
    """

    kind: ClassVar[str] = "neurons"

    site: NeuronSite
    method: NeuronScore
    layers: tuple[int, ...]
    spans: tuple[int, ...]
    layer: Tensor
    index: Tensor
    score: Tensor
    auroc: Tensor
    positive: Tensor
    negative: Tensor
    deviation: Tensor
    control: Tensor
    control_negative: Tensor
    massive: Tensor

    def _is_whole(self) -> bool:
        M = len(self.layer)
        per_unit = (self.index, self.score, self.auroc, self.positive, self.negative, self.deviation)
        return (
            self.site in get_args(NeuronSite)
            and self.method in get_args(NeuronScore)
            and self.are_layers(self.layers)
            and len(self.spans) == len(self.layers)
            and all(type(span) is int and 0 < span < 2**24 for span in self.spans)
            and 0 < M <= MAX_UNITS
            and all(t.shape == (M,) for t in (self.layer, *per_unit, self.control, self.control_negative))
            and self.massive.ndim == 2
            and self.massive.shape[1] == 2
            and len(self.massive) <= MAX_MASSIVE
            and bool(torch.isfinite(torch.stack([*per_unit, self.control_negative])).all())
            and bool(((self.auroc >= 0) & (self.auroc <= 1) & (self.deviation >= 0)).all())
            and self._are_places(self.layer, self.index)
            and self._are_places(self.layer, self.control)
            and self._are_places(self.massive[:, 0], self.massive[:, 1])
        )

    def _are_places(self, layer_M: Tensor, index_M: Tensor) -> bool:
        """Whether each pair is a unit of one of the plan's blocks."""
        span = dict(zip(self.layers, self.spans, strict=True))
        return all(
            layer in span and index == int(index) and 0 <= index < span[int(layer)]
            for layer, index in zip(layer_M.tolist(), index_M.tolist(), strict=True)
        )
