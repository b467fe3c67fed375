"""Plan of `subspace`: per block the mean, leading and trailing eigenvectors of the covariance, spectrum, scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steering.plan.base import Plan, is_orthonormal


@dataclass(frozen=True, eq=False, kw_only=True)
class SubspacePlan(Plan):
    """Principal components of the inputs of n blocks, centred, position 0 and massive activations left out.

    layers (n,) · mean (n, D) · spectrum (n, D) eigenvalues, descending · leading (n, K, D) and trailing (n, M, D)
    orthonormal eigenvectors, the most and the least variable first · score (n, K) = |u·(μ₊ − μ₋)| / √λ of the leading
    ones · spikes (n,) how many eigenvalues lie above the Marchenko–Pastur edge · flagged (n,) how many of the spikes
    among the leading ones score above the fit's quantile.
    """

    kind: ClassVar[str] = "subspace"

    layers: tuple[int, ...]
    mean: Tensor
    spectrum: Tensor
    leading: Tensor
    trailing: Tensor
    score: Tensor
    spikes: tuple[int, ...]
    flagged: tuple[int, ...]

    def _is_whole(self) -> bool:
        n, (_, K, _), (_, M, _) = len(self.layers), self.leading.shape, self.trailing.shape
        return (
            self.are_layers(self.layers)
            and 0 < K <= self.width
            and max(K, M) <= self.width
            and self.mean.shape == self.spectrum.shape == (n, self.width)
            and self.leading.shape == (n, K, self.width)
            and self.trailing.shape == (n, M, self.width)
            and self.score.shape == (n, K)
            and len(self.spikes) == len(self.flagged) == n
            and all(type(count) is int and 0 <= count <= self.width for count in (*self.spikes, *self.flagged))
            and all(count <= min(K, spikes) for count, spikes in zip(self.flagged, self.spikes, strict=True))
            and bool((self.spectrum >= 0).all() and (self.spectrum.diff(dim=-1) <= 0).all() and (self.score >= 0).all())
            and all(is_orthonormal(basis) for basis in (*self.leading, *self.trailing))
        )
