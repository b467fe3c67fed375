"""Plan of `language`: per block the autoencoder features that tell two languages apart, and the move between them.

    z_j = the feature's activation,   u = λ m Σ_j t_j d_j − λβ (Σ_i s_i z_i) Σ_j s_j d_j                  (1)

over the features kept at a block; t and s are unit vectors in the leading subspace of the differences: t towards the
target language, s what the source language has. m is how far the classes' means lie apart along t. See
`steering.fit.language`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from steering.law import Law
from steering.plan.base import MAX_RANK, Plan
from steering.plan.sae import SaeTap

SILENT = 1e-6
"""Features whose share of s is below it measure nothing and take no channel."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguagePlan(Plan):
    """At most K < 128 features of n neighbouring blocks, and as many random ones as the control.

    tap · layers (n,) · counts (n,) features kept at each; what follows is zero beyond them · number (n, K) their
    numbers in the autoencoder · probe (n, K, D), bias (n, K), knee (n, K): c·x + bias is the activation where c·x is
    above the knee, else the activation is 0 · write (n, K, D) what one unit of a feature adds · target t (n, K) and
    source s (n, K), unit vectors or zero · shift m (n,) · control_probe, control_bias, control_knee, control_write: of
    the control, whose `write` rows are scaled so that it writes as much towards the target.
    """

    kind: ClassVar[str] = "language"

    tap: SaeTap
    layers: tuple[int, ...]
    counts: tuple[int, ...]
    number: Tensor
    probe: Tensor
    bias: Tensor
    knee: Tensor
    write: Tensor
    target: Tensor
    source: Tensor
    shift: Tensor
    control_probe: Tensor
    control_bias: Tensor
    control_knee: Tensor
    control_write: Tensor

    def law(self, row: int, *, suppress: float, contrast: bool = True, control: bool = False) -> Law:
        """Equation (1) at one block for λ = 1, so that λ is the law's strength.

        Channel 0 is the open loop, of gain Σ t_j d_j; the others are the features that s weighs, rectified.
        contrast: count the first term in m, else in units of activation.
        """
        k = self.counts[row]
        prefix = "control_" if control else ""
        probe_KD, bias_K, knee_K, write_KD = (
            getattr(self, prefix + name)[row, :k] for name in ("probe", "bias", "knee", "write")
        )
        t_K, s_K = self.target[row, :k], self.source[row, :k]
        open_loop = Law.of(torch.zeros_like(probe_KD[0]), float(self.shift[row]) if contrast else 1.0, t_K @ write_KD)
        heard = torch.nonzero(s_K.abs() > SILENT).flatten()
        if suppress == 0 or not len(heard):
            return open_loop
        gain_RD = suppress * torch.outer(s_K[heard], s_K @ write_KD)
        bias_R = bias_K[heard]
        return open_loop + Law.of(probe_KD[heard], -bias_R, gain_RD, knee=knee_K[heard], floor=-bias_R)

    def _is_whole(self) -> bool:
        n, K, D = self.probe.shape
        per_feature = [self.number, self.bias, self.knee, self.target, self.source]
        per_feature += [self.control_bias, self.control_knee]
        beyond_nK = torch.arange(K) >= torch.tensor(self.counts)[:, None]
        length_2n = torch.stack([self.target, self.source]).double().norm(dim=-1)
        tensors = (self.probe, self.write, self.control_probe, self.control_write, self.shift, *per_feature)
        return (
            self.tap in get_args(SaeTap)
            and self.are_layers(self.layers)
            and len(self.layers) == len(self.counts) == n
            and 0 < K < MAX_RANK
            and self.width == D
            and all(type(count) is int and 0 < count <= K for count in self.counts)
            and all(t.shape == (n, K, D) for t in (self.write, self.control_probe, self.control_write))
            and all(t.shape == (n, K) for t in per_feature)
            and self.shift.shape == (n,)
            and all(bool(t.isfinite().all()) for t in tensors)
            and bool((self.shift >= 0).all())
            and bool((((length_2n - 1).abs() < 1e-3) | (length_2n == 0)).all())
            and not bool(self.target[beyond_nK].any() or self.source[beyond_nK].any())
        )
