"""Conditions on the device: gates are measured and answered within the forward pass, without waiting for the host.

    strength_tpr ← 0 where any gate that rules channel r on route p at token t is closed

A gate measures the input of its block before any law changes it there; laws of that block and of later ones are ruled.
Legend: G rows · T tokens · P routes · R channels · D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steering.runtime.scope import Frame
from steering.types import Site


@dataclass(frozen=True, slots=True)
class GateTensors:
    """G rows, one for each token of each spot, those of one site together.

    rules_GPR: 1 where the gate rules a channel. strength_TPR: what is spent where every gate is open. shut_TPR: how
    many gates have closed on a channel in this step.
    """

    rows: dict[Site, slice]
    tokens_G: Tensor
    probe_GD: Tensor
    low_G: Tensor
    high_G: Tensor
    rules_GPR: Tensor
    measured_G: Tensor
    strength_TPR: Tensor
    shut_TPR: Tensor
    order: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, frame: Frame, strength_TPR: Tensor, device: torch.device) -> GateTensors:
        """Put the spots of a frame on a device. `order[i]`: the rows of spot i."""
        by_site = sorted(range(len(frame.spots)), key=lambda i: frame.spots[i].gate.site)
        rows: dict[Site, slice] = {}
        order: dict[int, np.ndarray] = {}
        start = 0
        for i in by_site:
            spot = frame.spots[i]
            order[i] = np.arange(start, start + len(spot.tokens_K))
            start += len(spot.tokens_K)
            first = rows[spot.gate.site].start if spot.gate.site in rows else int(order[i][0])
            rows[spot.gate.site] = slice(first, start)
        spots = [frame.spots[i] for i in by_site for _ in order[i]]
        rules_GPR = np.zeros((start, *strength_TPR.shape[1:]), dtype=np.float32)
        for i, spot in enumerate(frame.spots):
            decided_P = np.array([spot.gate.decides(route) for route in frame.routes])
            rules_GPR[order[i], :, : len(spot.channels_R)] = decided_P[:, None] & spot.channels_R
        return cls(
            rows,
            torch.from_numpy(np.concatenate([frame.spots[i].tokens_K for i in by_site])).to(device),
            torch.stack([spot.gate.probe for spot in spots]).to(device, torch.float32),
            torch.tensor([spot.gate.low for spot in spots], device=device),
            torch.tensor([spot.gate.high for spot in spots], device=device),
            torch.from_numpy(rules_GPR).to(device),
            torch.zeros(start, device=device),
            strength_TPR.clone(),
            torch.zeros_like(strength_TPR),
            tuple(order[i] for i in range(len(frame.spots))),
        )

    def measure(self, site: Site, x_TD: Tensor, strength_TPR: Tensor) -> None:
        """Ask the gates of a site: measure the tokens' projections, and take the strength of what closes, in place."""
        rows = self.rows[site]
        tokens_G = self.tokens_G[rows]
        z_G = (x_TD[tokens_G].to(torch.float32) * self.probe_GD[rows]).sum(-1)
        self.measured_G[rows] = z_G
        is_shut_G = ~((z_G > self.low_G[rows]) & (z_G < self.high_G[rows]))
        self.shut_TPR.index_add_(0, tokens_G, self.rules_GPR[rows] * is_shut_G[:, None, None])
        # Selected, not multiplied: an infinite strength behind a closed gate is 0, not NaN.
        strength_TPR.copy_(self.strength_TPR.where(self.shut_TPR == 0, 0.0))
