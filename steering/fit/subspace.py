"""From examples to a subspace plan: the covariance of each block's input, its spikes, and which tell the classes apart.

    Σ = U Λ Uᵀ       covariance of the negative (reference) examples' tokens, float64, centred at their mean μ
    σ² = median(λ) / median of the Marchenko–Pastur law of ratio γ = D / tokens;   edge = σ²(1 + √γ)²
    score_i = |u_i·(μ₊ − μ)| / √λ_i

Under white noise no sample eigenvalue passes the edge, and a planted variance σ²(1 + θ) shows as one that does only
where θ > √γ (Baik, Ben Arous and Péché). Tokens of one text are not independent, so the true ratio is larger than γ:
the spikes are an upper estimate.

Left out: position 0 and the first `skip` tokens of a text, and tokens with a massive activation (|x| > 100 and more
than 1000 times the median of their text, arXiv:2402.17762), of which one would be the whole leading component.
Source: principal components; Marchenko and Pastur 1967.   Oracle: numpy's covariance and the law's density integrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from steering.artifact import MAX_BYTES, checked_name
from steering.errors import SpecError
from steering.fit.concept import PositionRule, Progress, encode_class, part_of, provenance
from steering.fit.examples import Example, checked_classes
from steering.fit.settings import ReadsExamples, chosen_blocks
from steering.plan import MAX_RANK, SubspacePlan
from steering.plant.capture import Pause, capture_each
from steering.plant.massive import are_massive
from steering.plant.plant import Plant
from steering.types import Site


@dataclass(frozen=True, kw_only=True)
class SubspaceSettings(ReadsExamples):
    """What a subspace plan holds. Raises SpecError for impossible values."""

    layers: tuple[int, ...] | None = None
    """Blocks whose input is decomposed; null means all but block 0."""
    leading: int = 64
    """Most leading components that are stored."""
    trailing: int = MAX_RANK
    """Most trailing components that are stored: what `keep` can take away."""
    quantile: float = 0.95
    """Spikes that score above this quantile of all are flagged for `filter`."""
    positions: PositionRule = "auto"
    """Tokens that are read: as for a concept."""
    skip: int = 8
    """Leading tokens of a text that are left out."""

    def __post_init__(self) -> None:
        for name, least in (("leading", 1), ("trailing", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not least <= value <= MAX_RANK:
                raise SpecError(name, expected=f"{least} to {MAX_RANK}", got=value)
        if not 0 <= self.quantile < 1:
            raise SpecError("quantile", expected="a number in [0, 1)", got=self.quantile)
        self.reading()

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth, range(min(1, depth - 1), depth))

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have."""
        self.chosen(plant.depth)


class Moments:
    """Sums over tokens at one site; float64 on the CPU. `massive` counts the tokens that were left out."""

    def __init__(self, width: int, *, square: bool) -> None:
        self.count, self.massive = 0, 0
        self.sum_D = torch.zeros(width, dtype=torch.float64)
        self.square_DD = torch.zeros(width, width, dtype=torch.float64) if square else None

    def add(self, x_TD: Tensor) -> None:
        """Take in the tokens of one text."""
        x_TD = x_TD.double().cpu()
        is_massive_T = are_massive(x_TD).any(-1)
        x_TD = x_TD[~is_massive_T]
        self.massive += int(is_massive_T.sum())
        self.count += len(x_TD)
        self.sum_D += x_TD.sum(0)
        if self.square_DD is not None:
            self.square_DD += x_TD.mT @ x_TD

    def mean(self) -> Tensor:
        """μ (D,)."""
        return self.sum_D / max(self.count, 1)

    def covariance(self) -> Tensor:
        """Σ (D, D), divided by the number of tokens."""
        assert self.square_DD is not None
        mean_D = self.mean()
        return self.square_DD / max(self.count, 1) - torch.outer(mean_D, mean_D)


def fit_subspace(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: SubspaceSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> SubspacePlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or SubspaceSettings()
    checked_name(name)
    layers = settings.chosen(plant.depth)
    D, (K, M) = plant.width, (min(n, plant.width) for n in (settings.leading, settings.trailing))
    if len(layers) * (K + M) * D * 4 > MAX_BYTES // 2:
        raise SpecError("layers", expected="fewer layers, or fewer components: the plan would pass half a gigabyte")
    classes = checked_classes(positive, negative)
    read = {}
    for side, start in (("positive", 0.0), ("negative", 0.4)):
        rows = encode_class(plant, side, classes[side], settings.reading(), pause)
        report = part_of(progress, f"states ({side})", start, start + 0.4)
        read[side] = _moments(plant, rows, layers, side == "negative", report, pause)
    if any(moments.count < 2 for side in read.values() for moments in side.values()):
        raise SpecError("negative", expected="at least two tokens of each class to read at every block")

    parts = []
    for done, layer in enumerate(layers):
        parts.append(_decomposed(read["positive"][layer], read["negative"][layer], K, M, settings.quantile))
        if progress:
            progress("spectra", 0.8 + 0.2 * (done + 1) / len(layers))
        if pause is not None:
            pause()
    reference = [read["negative"][layer] for layer in layers]
    quality = {
        "tokens": [moments.count for moments in reference],
        "massive_tokens": [moments.massive for moments in reference],
        "spikes": [part.spikes for part in parts],
        "flagged": [part.flagged for part in parts],
        "edge": [round(part.edge, 6) for part in parts],
        "leading_share": [round(float(part.spectrum_D[:K].sum() / part.spectrum_D.sum()), 4) for part in parts],
        "first_share": [round(float(part.spectrum_D[0] / part.spectrum_D.sum()), 4) for part in parts],
    }
    if progress:
        progress("done", 1.0)
    return SubspacePlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=D,
        quality=quality,
        provenance=provenance(asdict(settings) | {"layers": list(layers)}, classes),
        layers=layers,
        mean=torch.stack([moments.mean() for moments in reference]).float(),
        spectrum=torch.stack([part.spectrum_D for part in parts]).float(),
        leading=torch.stack([part.leading_KD for part in parts]).float(),
        trailing=torch.stack([part.trailing_MD for part in parts]).float(),
        score=torch.stack([part.score_K for part in parts]).float(),
        spikes=tuple(part.spikes for part in parts),
        flagged=tuple(part.flagged for part in parts),
    )


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The spectrum of one block's input, and what of it is stored."""

    spectrum_D: Tensor
    leading_KD: Tensor
    trailing_MD: Tensor
    score_K: Tensor
    edge: float
    spikes: int
    flagged: int


def _decomposed(plus: Moments, reference: Moments, K: int, M: int, quantile: float) -> Decomposition:
    """Eigenvectors, spikes and scores of one block."""
    rising_D, U_DD = torch.linalg.eigh(reference.covariance())
    spectrum_D, U_DD = rising_D.flip(0).clamp_min(0), U_DD.flip(1)
    edge = noise_edge(spectrum_D, reference.count)
    spikes = int((spectrum_D > edge).sum())
    leading_DK = U_DD[:, :K]
    floor = float(spectrum_D[0]) * 1e-12 + 1e-30
    score_K = (leading_DK.mT @ (plus.mean() - reference.mean())).abs() / spectrum_D[:K].clamp_min(floor).sqrt()
    spiked = score_K[:spikes]
    flagged = int((spiked >= torch.quantile(spiked, quantile)).sum()) if len(spiked) else 0
    trailing_DM = U_DD.flip(1)[:, :M]
    return Decomposition(
        spectrum_D, leading_DK.mT.contiguous(), trailing_DM.mT.contiguous(), score_K, edge, spikes, flagged
    )


def noise_edge(spectrum_D: Tensor, samples: int) -> float:
    """σ²(1 + √γ)² for eigenvalues (D,) of a covariance of `samples` rows, σ² from their median.

    With fewer samples than dimensions the median is taken over the eigenvalues that are not zero by construction.
    """
    gamma = len(spectrum_D) / samples
    seen = spectrum_D.sort(descending=True).values[: max(1, min(len(spectrum_D), samples - 1))]
    return float(seen.median()) / marchenko_pastur_median(gamma) * (1 + math.sqrt(gamma)) ** 2


def marchenko_pastur_median(gamma: float, *, points: int = 20_000) -> float:
    """Median of the law's continuous part at σ² = 1.

    With λ = 1 + γ + 2√γ cos θ the density becomes 2 sin²θ / (π λ) dθ on [0, π], which the midpoint rule integrates.
    """
    theta = (torch.arange(points, dtype=torch.float64) + 0.5) * (math.pi / points)
    value = 1 + gamma + 2 * math.sqrt(gamma) * theta.cos()
    weight = theta.sin().square() / value
    above = weight.cumsum(0) - weight / 2  # mass of the eigenvalues larger than λ(θ): θ = 0 is the upper edge
    return float(value[int((above >= weight.sum() / 2).nonzero()[0])])


def _moments(
    plant: Plant,
    rows: Sequence[tuple[list[int], Sequence[int]]],
    layers: tuple[int, ...],
    square: bool,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[int, Moments]:
    """Sums over the tokens of one class at the inputs of `layers`."""
    found = {layer: Moments(plant.width, square=square) for layer in layers}
    capture_each(
        plant,
        [ids for ids, _ in rows],
        [Site("resid_pre", layer) for layer in layers],
        lambda site, n, x_TD: found[site.layer].add(x_TD),
        [chosen for _, chosen in rows],
        progress=progress,
        pause=pause,
    )
    return found
