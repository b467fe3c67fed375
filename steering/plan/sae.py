"""Plan of `sae`: sparse autoencoders of one tap, a block each, and what is known of their features.

    p = W x / s + b,   z_j = p_j where p_j > θ_j else 0,   x̂ = s (b_dec + Σ_j z_j d_j)                     (1)

One constant s a block is the whole normalisation, the same in training and in use. What a published autoencoder
subtracts from its input is folded into b, so (1) reads the model's own activations. θ = 0 is a ReLU, θ > 0 a JumpReLU.
Oracle of a feature as a probe: z_j = max over {0, p_j} by θ, from (1) directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from steering.plan.base import MAX_RANK, ORTHONORMAL, Plan

SaeTap = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
"""Sites of the residual's width that an autoencoder may read."""
Measured = Literal["nothing", "texts", "classes"]
"""What a plan knows of its features: nothing, their activations on texts, or also which class they tell."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Autoencoder:
    """Equation (1) at one block: encoder (m, D), encoder_bias (m,), decoder (m, D) of unit or zero rows, decoder_bias
    (D,), threshold θ (m,) ≥ 0, scale s > 0, a tensor of no dimension."""

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls,
        encoder: Tensor,
        encoder_bias: Tensor,
        decoder: Tensor,
        decoder_bias: Tensor,
        threshold: Tensor | None = None,
        *,
        scale: Tensor | float = 1.0,
        centred: bool = False,
    ) -> Autoencoder:
        """The same function with unit decoder rows: z_j d_j stays where d_j is divided and all of p_j multiplied.

        centred: the encoder is meant for x/s − b_dec. threshold: None for a ReLU.
        """
        if centred:
            encoder_bias = encoder_bias - encoder @ decoder_bias
        norm_m = decoder.norm(dim=-1)
        norm_m = torch.where(norm_m > 0, norm_m, 1.0)
        theta_m = torch.zeros_like(encoder_bias) if threshold is None else threshold.clamp_min(0) * norm_m
        return cls(
            encoder=encoder * norm_m[:, None],
            encoder_bias=encoder_bias * norm_m,
            decoder=decoder / norm_m[:, None],
            decoder_bias=decoder_bias,
            threshold=theta_m,
            scale=torch.as_tensor(scale, dtype=encoder.dtype, device=encoder.device),
        )

    def encode(self, x_TD: Tensor) -> Tensor:
        """Activations z (T, m)."""
        p_Tm = (x_TD / self.scale) @ self.encoder.mT + self.encoder_bias
        return torch.where(p_Tm > self.threshold, p_Tm, 0.0)

    def decode(self, z_Tm: Tensor) -> Tensor:
        """Reconstruction x̂ (T, D)."""
        return self.scale * (self.decoder_bias + z_Tm @ self.decoder)

    def probes(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(probe (R, D), bias (R,), knee (R,)): a law with floor −bias measures z − bias.

        For c·x = p − b: it is above the knee θ − b exactly where the feature fires, and its floor is −b.
        """
        bias_R = self.encoder_bias[features]
        return self.encoder[features] / self.scale, bias_R, self.threshold[features] - bias_R

    def writes(self, features: Tensor) -> Tensor:
        """What one unit of each feature adds to x (R, D)."""
        return self.scale * self.decoder[features]


@dataclass(frozen=True, eq=False, kw_only=True)
class SaePlan(Plan):
    """Autoencoders of m features at n blocks.

    tap · layers (n,) · measured · encoder, decoder (n, m, D), encoder_bias, threshold (n, m), decoder_bias (n, D),
    scale (n,): equation (1) · peak (n, m) the largest activation seen, mean (n, m), rate (n, m) the share of tokens
    where a feature fires; zeros where `measured` is nothing · selectivity (n, m) = (μ₊ − μ₋)/(σ₊ + σ₋) over tokens,
    zeros unless `measured` is classes · control (n, C) numbers of random features in random order, those that fire
    first, C = min(256, m).
    """

    kind: ClassVar[str] = "sae"

    tap: SaeTap
    measured: Measured
    layers: tuple[int, ...]
    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    threshold: Tensor
    scale: Tensor
    peak: Tensor
    mean: Tensor
    rate: Tensor
    selectivity: Tensor
    control: Tensor

    @property
    def features(self) -> int:
        """m."""
        return self.encoder.shape[1]

    def autoencoder(self, row: int) -> Autoencoder:
        """That of one block."""
        names = ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "scale")
        return Autoencoder(**{name: getattr(self, name)[row] for name in names})

    def order(self, row: int) -> Tensor:
        """The features that the positive class has more of, the most selective first."""
        selectivity_m = self.selectivity[row]
        return selectivity_m.argsort(descending=True, stable=True)[: int((selectivity_m > 0).sum())]

    def _is_whole(self) -> bool:
        n, m, D = self.encoder.shape
        per_feature = (self.encoder_bias, self.threshold, self.peak, self.mean, self.rate, self.selectivity)
        norm_nm = self.decoder.double().norm(dim=-1)
        control = self.control.long()
        return (
            self.tap in get_args(SaeTap)
            and self.measured in get_args(Measured)
            and self.are_layers(self.layers)
            and len(self.layers) == n
            and self.width == D
            and m > 0
            and self.decoder.shape == (n, m, D)
            and all(tensor.shape == (n, m) for tensor in per_feature)
            and self.decoder_bias.shape == (n, D)
            and self.scale.shape == (n,)
            and self.control.shape == (n, min(2 * MAX_RANK, m))
            and bool((control == self.control).all() and (control >= 0).all() and (control < m).all())
            and all(len(set(row)) == len(row) for row in control.tolist())
            and all(bool(t.isfinite().all()) for t in (self.encoder, self.decoder, self.decoder_bias, *per_feature))
            and bool((self.scale > 0).all() and self.scale.isfinite().all() and (self.threshold >= 0).all())
            and bool((self.peak >= 0).all() and (self.rate >= 0).all() and (self.rate <= 1).all())
            and bool((((norm_nm - 1).abs() <= ORTHONORMAL) | (norm_nm == 0)).all())
        )
