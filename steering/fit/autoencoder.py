"""Training one sparse autoencoder on states, and what its features do on the tokens of two classes.

    y = x / s,   z = relu(W (y − b_dec) + b),   ŷ = b_dec + Σ_j z_j d_j,   ‖d_j‖ = 1
    loss = ‖y − ŷ‖² + l1 Σ_j z_j,     s² = mean ‖x − x̄‖²

With this s the first term of a mean batch is the share of variance that is not explained, so one l1 means the same in
every model. What is trained on is what is encoded later: x/s with one constant s, stored beside the weights. (Published
code normalises every token while it trains and encodes raw ones after.) Decoder rows stay unit vectors: the gradient's
part along them is taken off and they are rescaled after each step; without it the penalty is escaped by long rows.
W begins as the decoder, b_dec as the mean.

    selectivity_j = (μ₊ − μ₋) / (σ₊ + σ₋ + 1e-6)      over tokens                 arXiv:2602.00945, stage I

Shapes: x (N, D), m features.   Cost: 6·2·m·D multiply-adds per token of a batch and step.
Source: Bricken et al., Towards Monosemanticity (2023), without resampling; dead features are counted instead.
Oracles: explained variance from the sums written out; the gradient's projection leaves row norms at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from steering.plan.sae import Autoencoder
from steering.plant.capture import Pause

CHUNK = 4096
"""Tokens that are encoded at a time: bounds memory, does not change a figure."""
COOLING = 0.8
"""After this share of the steps the learning rate falls to zero on a line."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an autoencoder is trained."""

    features: int
    l1: float
    steps: int
    lr: float
    batch: int
    seed: int


def train(
    x_ND: Tensor, how: Training, pause: Pause | None = None, progress: Callable[[int, int], None] | None = None
) -> Autoencoder:
    """Train on the rows of x (float32, on its device), at least two of them unlike. Deterministic for a seed."""
    generator = torch.Generator().manual_seed(how.seed)
    center_D = x_ND.double().mean(0).float()
    scale = float((x_ND - center_D).double().square().sum(-1).mean().sqrt())
    y_ND = x_ND / scale
    first_mD = normalize(torch.randn(how.features, x_ND.shape[1], generator=generator), dim=-1).to(x_ND.device)
    with torch.enable_grad():
        W, b = first_mD.clone().requires_grad_(), torch.zeros_like(first_mD[:, 0]).requires_grad_()
        d, b_dec = first_mD.clone().requires_grad_(), (center_D / scale).clone().requires_grad_()
        adam = torch.optim.Adam([W, b, d, b_dec], lr=how.lr)
        for step in range(how.steps):
            left = (how.steps - step) / max(how.steps * (1 - COOLING), 1.0)
            adam.param_groups[0]["lr"] = how.lr * min(1.0, left)
            y = y_ND[torch.randint(len(y_ND), (how.batch,), generator=generator).to(y_ND.device)]
            z = torch.relu((y - b_dec) @ W.mT + b)
            loss = (y - b_dec - z @ d).square().sum(-1).mean() + how.l1 * z.sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            with torch.no_grad():
                assert d.grad is not None
                d.grad -= (d.grad * d).sum(-1, keepdim=True) * d
                adam.step()
                d.copy_(normalize(d, dim=-1))
            if progress is not None:
                progress(step + 1, how.steps)
            if pause is not None:
                pause()
    found = [tensor.detach().cpu() for tensor in (W, b, d, b_dec)]
    return Autoencoder.of(*found, scale=scale, centred=True)


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How well states are rebuilt: share of variance explained, mean number of features that fire, and the share of
    the variance that a random dictionary of the same size and sparsity explains."""

    explained: float
    active: float
    random: float


def fidelity(ae: Autoencoder, x_ND: Tensor, *, seed: int = 0, pause: Pause | None = None) -> Fidelity:
    """Of the rows of x, at least one.

    The random dictionary has as many random unit rows, and of each token the same number fire, those with the largest
    products; one factor on all of them is chosen in hindsight, which favours it.
    """
    generator = torch.Generator().manual_seed(seed)
    random_mD = normalize(torch.randn(ae.decoder.shape, generator=generator), dim=-1).to(x_ND)
    mean_D = x_ND.double().mean(0)
    total = float((x_ND.double() - mean_D).square().sum())
    missed = active = 0.0
    for x_TD in x_ND.split(CHUNK):
        z_Tm = ae.encode(x_TD)
        missed += float((x_TD - ae.decode(z_Tm)).double().square().sum())
        active += float((z_Tm > 0).sum())
        if pause is not None:
            pause()
    k = max(1, round(active / len(x_ND)))
    own = cross = size = 0.0
    for x_TD in x_ND.split(CHUNK):
        y_TD = x_TD - ae.scale * ae.decoder_bias
        a_Tm = torch.relu(y_TD @ random_mD.mT)
        kept = a_Tm.topk(min(k, a_Tm.shape[1]), dim=-1)
        guess_TD = torch.zeros_like(a_Tm).scatter_(1, kept.indices, kept.values) @ random_mD
        own += float(y_TD.double().square().sum())
        cross += float((y_TD * guess_TD).double().sum())
        size += float(guess_TD.double().square().sum())
        if pause is not None:
            pause()
    random_missed = own - cross**2 / max(size, 1e-30)
    floor = max(total, 1e-30)
    return Fidelity(1 - missed / floor, active / len(x_ND), 1 - random_missed / floor)


@dataclass(frozen=True, eq=False)
class Activity:
    """What the features do on tokens (m,), float64: peak, mean, rate of firing, and standard deviation."""

    peak: Tensor
    mean: Tensor
    rate: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, ae: Autoencoder, x_ND: Tensor, pause: Pause | None = None) -> Activity:
        """Of the rows of x, at least one."""
        m = len(ae.encoder)
        peak, total, square, fired = (torch.zeros(m, dtype=torch.float64) for _ in range(4))
        for x_TD in x_ND.split(CHUNK):
            z_Tm = ae.encode(x_TD).double().cpu()
            peak = torch.maximum(peak, z_Tm.amax(0))
            total += z_Tm.sum(0)
            square += z_Tm.square().sum(0)
            fired += (z_Tm > 0).sum(0)
            if pause is not None:
                pause()
        n = len(x_ND)
        return cls(peak, total / n, fired / n, (square / n - (total / n).square()).clamp_min(0).sqrt())


def selectivity(plus: Activity, minus: Activity) -> Tensor:
    """(m,): above zero where the positive class has more of a feature."""
    return (plus.mean - minus.mean) / (plus.deviation + minus.deviation + 1e-6)


def random_features(rate_m: Tensor, most: int, seed: int) -> Tensor:
    """Numbers of at most `most` random features (C,), in random order: those that fire, then those that do not."""
    shuffled = torch.randperm(len(rate_m), generator=torch.Generator().manual_seed(seed))
    fires = rate_m[shuffled] > 0
    return torch.cat([shuffled[fires], shuffled[~fires]])[: math.ceil(most)]
