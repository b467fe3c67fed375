"""From two classes of texts to a transport plan: affine maps of every coordinate, fitted block after block.

    x_(1) ≤ … ≤ x_(N), y_(1) ≤ … ≤ y_(N)     one coordinate's values in the source and in the target, sorted
    ω = Σ (x_(i) − m_x)(y_(i) − m_y) / Σ (x_(i) − m_x)²,       b = m_y − ω m_x                          linear
    ω = 1                                                                                               mean

A value is the mean over the tokens of one text. In one dimension the optimal coupling pairs sorted values, and ω, b are
the least-squares line through the pairs: for Gaussians σ_y/σ_x. The source are the negative examples, the target the
positive. Classes of unlike sizes are paired by their quantiles. Where the source does not vary, ω = 1.

Blocks are fitted one after another: what block l is fitted on are the source's states under the maps of the blocks
before it, at every token but position 0, which is what will reach it; so the maps do not all make up for the same
difference. Bounds are the source's `low` and `high` quantiles, which is its range by default.

Quality, per block and on examples held out of the fit: the 1-Wasserstein distance between source and target, the mean
over coordinates, each in pooled standard deviations: `unsteered`, `before` the block's own map but under those of the
blocks before, `after` it, and `random`, after the control. The control gives each coordinate the map of a random other
one, in standard deviations of its own: as large a change as the fitted one. (Maps between shuffled classes, the other
control that offers itself, are close to the identity: next to them any change at all would stand out.)
Cost: n + 1 forward passes of the source, one of the target.
Source: Linear-AcT, arXiv:2410.23054, Sec. 3.
Oracle: least squares of numpy on sorted columns; σ_y/σ_x for Gaussians; `scipy.stats.wasserstein_distance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steering.artifact import checked_name
from steering.errors import SpecError
from steering.fit.concept import PositionRule, Progress, encode_class, held_out, part_of, provenance
from steering.fit.examples import Example, checked_classes
from steering.fit.quality import FITTED_ONLY
from steering.fit.settings import ReadsExamples, chosen_blocks
from steering.plan import TransportForm, TransportPlan, TransportSite
from steering.plant.capture import Pause, capture_means
from steering.plant.plant import Plant
from steering.types import Site

Encoded = tuple[list[int], Sequence[int]]
FLAT = 1e-6
"""Standard deviation, as a share of the largest |value|, below which a coordinate does not vary in float32."""
EVERYTHING = torch.finfo(torch.float32).max
"""A bound that no float32 passes; artifacts hold finite numbers."""


@dataclass(frozen=True, kw_only=True)
class TransportSettings(ReadsExamples):
    """How the maps are fitted. Raises SpecError for impossible values."""

    layers: tuple[int, ...] | None = None
    """Blocks whose site is mapped; null means all."""
    site: TransportSite = "resid_post"
    """`resid_post`, `mlp_out` or `attn_out`."""
    form: TransportForm = "linear"
    """`linear`: scale and shift; `mean`: the shift alone."""
    support: Literal["quantiles", "all"] = "quantiles"
    """Map only what lies between the source's quantiles `low` and `high`, or everything."""
    low: float = 0.0
    """Quantile of the source's values at which the support begins."""
    high: float = 1.0
    """Quantile at which it ends."""
    positions: PositionRule = "auto"
    """Tokens that are averaged: as for a concept."""
    skip: int = 1
    """Leading tokens of a text that are left out."""
    seed: int = 0
    """Of the control."""

    def __post_init__(self) -> None:
        for name, known in (
            ("site", get_args(TransportSite)),
            ("form", get_args(TransportForm)),
            ("support", ("quantiles", "all")),
        ):
            if getattr(self, name) not in known:
                raise SpecError(name, expected=f"one of {', '.join(known)}", got=getattr(self, name))
        for name in ("low", "high"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(name, expected="a number in [0, 1]", got=getattr(self, name))
        if not self.low < self.high:
            raise SpecError("low", expected=f"less than high, {self.high}", got=self.low)
        self.reading()

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have."""
        self.chosen(plant.depth)


class Map(NamedTuple):
    """z → ω z + b between low and high, for D coordinates; float64."""

    scale_D: Tensor
    shift_D: Tensor
    low_D: Tensor
    high_D: Tensor

    def __call__(self, z_XD: Tensor) -> Tensor:
        """The values after the map, whatever stands before the last dimension."""
        scale, shift, low, high = (t.to(z_XD) for t in self)
        return torch.where((z_XD >= low) & (z_XD <= high), scale * z_XD + shift, z_XD)


def fit_transport(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: TransportSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> TransportPlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or TransportSettings()
    checked_name(name)
    sites = [Site(settings.site, layer) for layer in settings.chosen(plant.depth)]
    classes = checked_classes(positive, negative)
    encoded = {side: encode_class(plant, side, rows, settings.reading(), pause) for side, rows in classes.items()}
    y_held, x_held = (held_out(len(encoded[side])) for side in ("positive", "negative"))
    measured_on = "held-out" if bool(x_held.any()) and bool(y_held.any()) else "fitted"
    y_new, x_new = (held if measured_on == "held-out" else ~held for held in (y_held, x_held))

    shell = plant.shell()
    share = 1 / (len(sites) + 2)

    def means(side: str, wanted: Sequence[Site], step: int) -> dict[Site, Tensor]:
        stage = f"states ({side})" if step < 2 else f"transport ({wanted[0]})"
        report = part_of(progress, stage, step * share, (step + 1) * share)
        return _means(plant, encoded[side], wanted, shell, report, pause)

    target, unsteered = means("positive", sites, 0), means("negative", sites, 1)
    generator = torch.Generator().manual_seed(settings.seed)
    maps, controls, figures = [], [], []
    for step, site in enumerate(sites):
        y_ND = target[site]
        x_ND = means("negative", [site], step + 2)[site] if step else unsteered[site]
        fitted = transport(x_ND[~x_held], y_ND[~y_held], settings)
        control = permuted(fitted, x_ND[~x_held], torch.randperm(plant.width, generator=generator))
        maps.append(fitted)
        controls.append(control)
        x_new_ND, y_new_ND = x_ND[x_new], y_ND[y_new]
        figures.append(
            {
                "unsteered": distance(unsteered[site][x_new], y_new_ND),
                "before": distance(x_new_ND, y_new_ND),
                "after": distance(fitted(x_new_ND), y_new_ND),
                "random": distance(control(x_new_ND), y_new_ND),
            }
        )
        plant.tap(shell, site, _applied(fitted))
    quality = _quality(figures, measured_on)
    if progress:
        progress("done", 1.0)
    scale, shift, low, high = (torch.stack(parts).float() for parts in zip(*maps, strict=True))
    control_scale, control_shift, *_ = (torch.stack(parts).float() for parts in zip(*controls, strict=True))
    return TransportPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance=provenance(asdict(settings) | {"layers": [site.layer for site in sites]}, classes),
        layers=tuple(site.layer for site in sites),
        site=settings.site,
        form=settings.form,
        scale=scale,
        shift=shift,
        low=low,
        high=high,
        control_scale=control_scale,
        control_shift=control_shift,
    )


def transport(x_ND: Tensor, y_ND: Tensor, settings: TransportSettings) -> Map:
    """The map of every coordinate from the source's values (N, D) to the target's (N', D), float64."""
    x_ND, y_ND = x_ND.double(), y_ND.double()
    m_x, m_y = x_ND.mean(0), y_ND.mean(0)
    scale_D = torch.ones_like(m_x)
    if settings.form == "linear":
        count = min(len(x_ND), len(y_ND))
        x_CD, y_CD = quantiles(x_ND, count), quantiles(y_ND, count)
        x_CD, y_CD = x_CD - x_CD.mean(0), y_CD - y_CD.mean(0)
        varies_D = x_CD.square().mean(0).sqrt() > FLAT * x_ND.abs().amax(0)
        square_D = x_CD.square().sum(0).where(varies_D, 1.0)
        scale_D = ((x_CD * y_CD).sum(0) / square_D).where(varies_D, 1.0)
    if settings.support == "all":
        low_D, high_D = torch.full_like(m_x, -EVERYTHING), torch.full_like(m_x, EVERYTHING)
    else:
        low_D, high_D = torch.quantile(x_ND, torch.tensor([settings.low, settings.high], dtype=torch.float64), dim=0)
    return Map(scale_D, m_y - scale_D * m_x, low_D, high_D)


def quantiles(x_ND: Tensor, count: int) -> Tensor:
    """`count` values (count, D) at equally spaced quantiles of each column: the sorted column where count is N."""
    sorted_ND = x_ND.sort(dim=0).values
    at = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(x_ND) / count) - 0.5
    at = at.clamp(0, len(x_ND) - 1)
    below = at.floor().long()
    above = at.ceil().long()
    return torch.lerp(sorted_ND[below], sorted_ND[above], (at - below)[:, None])


def permuted(fitted: Map, x_ND: Tensor, order_D: Tensor) -> Map:
    """The map that gives coordinate d what coordinate `order_D[d]` has, in standard deviations of its source values.

    About its mean a map is z̃ → ω z̃ + δ, z̃ = (z − m)/s and δ = (ω m + b − m)/s. The bounds stay.
    """
    x_ND = x_ND.double()
    m_D, s_D = x_ND.mean(0), x_ND.std(0, correction=0)
    # Of a coordinate that varies by rounding alone the deviation is no unit: others would be sent anywhere.
    varies_D = s_D > FLAT * x_ND.abs().amax(0)
    delta_D = ((fitted.scale_D * m_D + fitted.shift_D - m_D) / s_D.where(varies_D, 1.0)).where(varies_D, 0.0)
    scale_D = fitted.scale_D[order_D]
    return Map(scale_D, m_D + s_D * delta_D[order_D] - scale_D * m_D, fitted.low_D, fitted.high_D)


def distance(x_ND: Tensor, y_ND: Tensor) -> float:
    """1-Wasserstein distance of the columns in pooled standard deviations, the mean over those that vary."""
    x_ND, y_ND = x_ND.double(), y_ND.double()
    spread_D = ((x_ND.var(0, correction=0) + y_ND.var(0, correction=0)) / 2).sqrt()
    varies_D = spread_D > FLAT * torch.maximum(x_ND.abs().amax(0), y_ND.abs().amax(0))
    if not bool(varies_D.any()):
        return 0.0
    # |F⁻¹ − G⁻¹| is constant between neighbouring jumps of either quantile function.
    cuts = torch.tensor(sorted({i / len(z) for z in (x_ND, y_ND) for i in range(len(z) + 1)}), dtype=torch.float64)
    middle, length = (cuts[1:] + cuts[:-1]) / 2, cuts.diff()
    x_QD, y_QD = (z.sort(dim=0).values[(middle * len(z)).long()] for z in (x_ND, y_ND))
    w_D = (length[:, None] * (x_QD - y_QD).abs()).sum(0)
    return float((w_D[varies_D] / spread_D[varies_D]).mean())


def _means(
    plant: Plant,
    rows: Sequence[Encoded],
    sites: Sequence[Site],
    shell: PreTrainedModel,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[Site, Tensor]:
    """Means (N, D) over the chosen tokens of each text, float64, as the taps of `shell` leave the model."""
    ids, positions = [row[0] for row in rows], [row[1] for row in rows]
    found = capture_means(plant, ids, sites, positions, progress=progress, pause=pause, shell=shell)
    return {site: mean_ND.double() for site, mean_ND in found.items()}


def _applied(fitted: Map) -> Callable[[Tensor], Tensor]:
    """The map as a tap: of all tokens but position 0."""

    def tap(z_BTD: Tensor) -> Tensor:
        mapped = fitted(z_BTD.float()).to(z_BTD.dtype)
        return torch.cat([z_BTD[..., :1, :], mapped[..., 1:, :]], dim=-2)

    return tap


def _quality(figures: Sequence[dict[str, float]], measured_on: str) -> dict[str, Any]:
    """The distances by block, their means, and a sentence where the map brings less than its control would."""
    by_block = {name: [round(part[name], 4) for part in figures] for name in figures[0]}
    mean = {name: round(sum(part[name] for part in figures) / len(figures), 4) for name in figures[0]}
    quality: dict[str, Any] = {"measured_on": measured_on, "distance": by_block, "mean_distance": mean}
    if mean["after"] >= min(mean["before"], mean["random"]):
        what = "nothing" if mean["before"] <= mean["random"] else "random maps"
        quality["warning"] = (
            f"The maps leave the classes {mean['after']:.2f} standard deviations apart, no nearer than {what} would "
            f"({min(mean['before'], mean['random']):.2f}): give more examples, and clearer ones."
        )
    elif measured_on != "held-out":
        quality["warning"] = FITTED_ONLY
    return quality
