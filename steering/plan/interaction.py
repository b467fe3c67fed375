"""Plan of `interaction`: per block the local interaction basis of its input, and the principal components beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steering.plan.base import MAX_RANK, Plan, is_orthonormal

DUAL = 1e-2
"""How far C⁺ C of stored rows may be from I: they are oblique, so rounding shows more than in a basis."""


@dataclass(frozen=True, eq=False, kw_only=True)
class InteractionPlan(Plan):
    """The interaction basis at the inputs of n blocks, centred at the mean.

    layers (n,) · mean μ (n, D) · ranks (n,) how many features there are · spectrum Λ (n, D), descending, 0 beyond the
    rank · probe (n, K, D) the first columns of C, scaled to what their rows of C⁺ have left · gain (n, K, D) the first
    rows of C⁺, of unit length · probe_rest, gain_rest (n, M, D) the last ones, the very last first · pca (n, K, D),
    pca_rest (n, M, D) the same many principal components, orthonormal. Feature j of x is z = probe_j·(x − μ) and makes
    z gain_j of x; K and M do not exceed the least rank.
    """

    kind: ClassVar[str] = "interaction"

    layers: tuple[int, ...]
    mean: Tensor
    ranks: tuple[int, ...]
    spectrum: Tensor
    probe: Tensor
    gain: Tensor
    probe_rest: Tensor
    gain_rest: Tensor
    pca: Tensor
    pca_rest: Tensor

    def _is_whole(self) -> bool:
        n, (_, K, _), (_, M, _) = len(self.layers), self.probe.shape, self.probe_rest.shape
        return (
            self.are_layers(self.layers)
            and len(self.ranks) == n
            and all(type(rank) is int and max(K, M) <= rank <= self.width for rank in self.ranks)
            and 0 < K <= MAX_RANK
            and M <= MAX_RANK
            and self.mean.shape == self.spectrum.shape == (n, self.width)
            and self.probe.shape == self.gain.shape == self.pca.shape == (n, K, self.width)
            and self.probe_rest.shape == self.gain_rest.shape == self.pca_rest.shape == (n, M, self.width)
            and bool((self.spectrum >= 0).all() and (self.spectrum.diff(dim=-1) <= 0).all())
            and all(map(_are_dual, (*self.probe, *self.probe_rest), (*self.gain, *self.gain_rest)))
            and all(is_orthonormal(basis) for basis in (*self.pca, *self.pca_rest))
        )


def _are_dual(probe_KD: Tensor, gain_KD: Tensor) -> bool:
    """Whether feature j of gain k is 1 for j = k, else 0."""
    gram_KK = probe_KD.double() @ gain_KD.double().mT
    return bool(((gram_KK - torch.eye(len(probe_KD), dtype=torch.float64)).abs() <= DUAL).all())
