"""Conditions on the device: gates are measured and answered within the forward pass, without waiting for the host.

    strength_tpr ← 0 where any gate that rules channel r on route p at token t is closed

A gate measures the input of its block before any law changes it there; laws of that block and of later ones are ruled.
Legend: G rows · T tokens · P routes · R channels · D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steering.runtime.scope import Frame
from steering.runtime.transfer import upload
from steering.types import Site


@dataclass(frozen=True, slots=True)
class GateTensors:
    """G rows, one for each token of each spot, those of one site together; behind them rows to spare that rule nothing.

    rules_GPR: 1 where the gate rules a channel. strength_TPR: what is spent where every gate is open. shut_TPR: how
    many gates have closed on a channel in this step. order: the rows of each of the frame's spots.
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
    order: list[np.ndarray]

    @classmethod
    def of(cls, room: Mapping[Site, int], width: int, strength_TPR: Tensor) -> GateTensors:
        """Room for so many rows of each site, whose states have this width, to be loaded with a frame."""
        rows: dict[Site, slice] = {}
        n = 0
        for site, more in room.items():
            rows[site] = slice(n, n + more)
            n += more
        device = strength_TPR.device
        return cls(
            rows,
            torch.zeros(n, dtype=torch.int64, device=device),
            torch.zeros(n, width, device=device),
            torch.zeros(n, device=device),
            torch.zeros(n, device=device),
            torch.zeros(n, *strength_TPR.shape[1:], device=device),
            torch.zeros(n, device=device),
            torch.zeros_like(strength_TPR),
            torch.zeros_like(strength_TPR),
            [],
        )

    def load(self, frame: Frame, strength_TPR: Tensor) -> None:
        """Take the spots of a frame, and the strengths that its open gates leave."""
        G, device = len(self.tokens_G), self.tokens_G.device
        tokens_G = np.zeros(G, dtype=np.int64)
        bounds_2G = np.zeros((2, G), dtype=np.float32)
        rules_GPR = np.zeros(self.rules_GPR.shape, dtype=np.float32)
        probe_GD = torch.zeros(self.probe_GD.shape)
        self.order.clear()
        taken = {site: rows.start for site, rows in self.rows.items()}
        for spot in frame.spots:
            start = taken[spot.gate.site]
            own = np.arange(start, start + len(spot.tokens_K))
            taken[spot.gate.site] += len(own)
            self.order.append(own)
            tokens_G[own] = spot.tokens_K
            bounds_2G[:, own] = [[spot.gate.low], [spot.gate.high]]
            probe_GD[own] = spot.gate.probe.to("cpu", torch.float32)
            decided_P = np.array([spot.gate.decides(route) for route in frame.routes])
            rules_GPR[own, :, : len(spot.channels_R)] = decided_P[:, None] & spot.channels_R
        bounds = upload(bounds_2G, device)
        self.tokens_G.copy_(upload(tokens_G, device))
        self.low_G.copy_(bounds[0])
        self.high_G.copy_(bounds[1])
        self.rules_GPR.copy_(upload(rules_GPR, device))
        self.probe_GD.copy_(upload(probe_GD, device))
        self.strength_TPR.copy_(strength_TPR)

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


def rows_of(frame: Frame) -> dict[Site, int]:
    """How many tokens the gates of each site ask."""
    rows: dict[Site, int] = {}
    for spot in frame.spots:
        rows[spot.gate.site] = rows.get(spot.gate.site, 0) + len(spot.tokens_K)
    return rows
