"""From examples to a plan of attention heads: along which direction each tells the classes apart, and which do best.

    mean_difference   θ = (μ₊ − μ₋) / ‖μ₊ − μ₋‖,   the threshold halfway between the class means of θ·x
    logistic          min_{w,b} (1/N) Σ log(1 + exp(−y (w·x̂ + b))) + (ridge/2) ‖w‖²,   θ = w / ‖w‖            y = ±1
    σ = std of θ·x over all examples

x is a head's output at an example's last token (the mean over what `positions` selects), x̂ the same centred and divided
by the head's root mean square, so that one ridge fits all heads. θ is turned so that the positive class has more of it.
Heads are ranked by their accuracy on held-out examples, equal ones by the separation of the class means there, for a
few dozen examples leave many heads equal. The logistic probes of all heads are fitted together by Newton's method.

Quality: accuracy of the 48 best heads and of 48 random ones, held out. The ranking has seen these examples, as the
published one has, so the best heads' figure is kind to them; `random` is not, and neither is `accuracy_unseen`, for
which each half of the held-out examples ranks the heads that the other half measures.
Shapes: x (N, n, H, d).   Cost: n·H systems of d + 1 unknowns a Newton step.
Source: ITI, arXiv:2306.03341, Sec. 3 (K = 48, α = 15; a fifth of the examples validates).   Oracle: scipy.optimize.
Of the published code we leave: σ over the training rows with the direction of another fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import torch
from torch import Tensor

from steering.artifact import checked_name
from steering.errors import ControlError, SpecError
from steering.fit.concept import PositionRule, Progress, encode_class, held_out, part_of, provenance
from steering.fit.examples import Example, checked_classes
from steering.fit.quality import FITTED_ONLY
from steering.fit.settings import ReadsExamples, chosen_blocks
from steering.fit.units import ordinary, without_position_0
from steering.plan.base import MAX_RANK
from steering.plan.heads import HeadProbe, HeadsPlan
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

USUAL = 48
"""K of the publication, at which quality is told."""
NEWTON_STEPS, NEWTON_TOLERANCE = 50, 1e-9


@dataclass(frozen=True, kw_only=True)
class HeadsSettings(ReadsExamples):
    """How heads are probed. Raises SpecError for impossible values."""

    probe: HeadProbe = "mean_difference"
    """`mean_difference` or `logistic`: see above."""
    ridge: float = 0.01
    """Of the logistic probe."""
    layers: tuple[int, ...] | None = None
    """Blocks whose heads are probed; null means all."""
    positions: PositionRule = "last"
    """Tokens that are read: as for a concept."""
    skip: int = 8
    """Leading tokens of a text that are left out."""
    seed: int = 0
    """Of the random heads."""

    def __post_init__(self) -> None:
        if self.probe not in get_args(HeadProbe):
            raise SpecError("probe", expected=f"one of {', '.join(get_args(HeadProbe))}", got=self.probe)
        if not 1e-6 <= self.ridge <= 1e6:
            raise SpecError("ridge", expected="a number in [1e-6, 1e6]", got=self.ridge)
        self.reading()

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have, or for more heads than a law has channels."""
        self.chosen(plant.depth)
        if plant.heads.count > MAX_RANK:
            raise SpecError("layers", expected=f"a model with at most {MAX_RANK} heads a block", got=plant.heads.count)


@dataclass(frozen=True, eq=False)
class Probes:
    """θ (B, d), unit or zero, and threshold (B,) of B heads: positive where θ·x is above it."""

    direction_BD: Tensor
    threshold_B: Tensor

    def right(self, plus_BN: Tensor, minus_BN: Tensor) -> Tensor:
        """Balanced accuracy (B,) on projections of each class; a projection at the threshold is half right."""
        above, below = plus_BN - self.threshold_B[:, None], self.threshold_B[:, None] - minus_BN
        return sum(((x > 0).double() + 0.5 * (x == 0)).mean(1) for x in (above, below)) / 2  # type: ignore[return-value]


def fit_heads(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: HeadsSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> HeadsPlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named), PlantError (a chat for a model without a template) and
    ControlError (a logistic probe that does not settle).
    """
    settings = settings or HeadsSettings()
    checked_name(name)
    settings.for_model(plant)
    layers, H, d = settings.chosen(plant.depth), plant.heads.count, plant.heads.width
    classes = checked_classes(positive, negative)
    states, held = {}, {}
    for side, start in (("positive", 0.0), ("negative", 0.45)):
        encoded = without_position_0(encode_class(plant, side, classes[side], settings.reading(), pause))
        report = part_of(progress, f"states ({side})", start, start + 0.45)
        states[side] = torch.zeros(len(encoded), len(layers), H * d)

        def keep(site: Site, n: int, x_TE: Tensor, side: str = side) -> None:
            states[side][n, layers.index(site.layer)] = ordinary(x_TE.float()).mean(0).cpu()

        sites = [Site("attn_act", layer) for layer in layers]
        ids, chosen = [row[0] for row in encoded], [row[1] for row in encoded]
        capture_each(plant, ids, sites, keep, chosen, progress=report, pause=pause)
        held[side] = held_out(len(encoded))
    is_held = all(bool(part.any()) for part in held.values())
    # Heads first: (B, N, d), a head of a block a row.
    x = {side: value.reshape(len(value), -1, d).transpose(0, 1).double() for side, value in states.items()}
    probes = _probes(x["positive"][:, ~held["positive"]], x["negative"][:, ~held["negative"]], settings, pause)
    if not bool(probes.direction_BD.any()):
        raise SpecError("positive", expected="examples that differ from the negative ones", advice="no head's means do")
    z_plus, z_minus = (torch.einsum("bnd,bd->bn", value, probes.direction_BD) for value in x.values())
    measured = [z[:, held[side]] if is_held else z for side, z in zip(held, (z_plus, z_minus), strict=True)]
    accuracy_B, separation_B = probes.right(*measured), _separation(*measured)
    order_B = _ranked(accuracy_B, separation_B)
    control_B = torch.randperm(len(order_B), generator=torch.Generator().manual_seed(settings.seed))
    K = min(USUAL, max(1, len(order_B) // 2))
    shape = (len(layers), H)
    if progress:
        progress("done", 1.0)
    return HeadsPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=_quality(
            accuracy_B[order_B[:K]],
            accuracy_B[control_B[:K]],
            accuracy_B,
            is_held,
            _unseen(probes, measured[0], measured[1], K),
        ),
        provenance=provenance(asdict(settings) | {"layers": list(layers)}, classes),
        layers=layers,
        probe=settings.probe,
        accuracy=accuracy_B.reshape(shape).float(),
        direction=probes.direction_BD.reshape(*shape, d).float(),
        deviation=torch.cat([z_plus, z_minus], dim=1).std(1, correction=0).reshape(shape).float(),
        positive=z_plus.mean(1).reshape(shape).float(),
        negative=z_minus.mean(1).reshape(shape).float(),
        mean=torch.cat(list(x.values()), dim=1).mean(1).reshape(*shape, d).float(),
        order=order_B.float(),
        control=control_B.float(),
    )


def _probes(plus_BND: Tensor, minus_BND: Tensor, settings: HeadsSettings, pause: Pause | None) -> Probes:
    """Directions and thresholds of B heads from their fitted examples."""
    mean_plus, mean_minus = plus_BND.mean(1), minus_BND.mean(1)
    difference_BD = mean_plus - mean_minus
    noise_B = 1e-6 * torch.maximum(mean_plus.norm(dim=-1), mean_minus.norm(dim=-1))
    differs_B = difference_BD.norm(dim=-1) > noise_B
    w_BD, b_B = difference_BD, torch.zeros(len(difference_BD), dtype=torch.float64)
    if settings.probe == "logistic":
        x_BND = torch.cat([plus_BND, minus_BND], dim=1)
        centre_BD = x_BND.mean(1)
        x_BND = x_BND - centre_BD[:, None]
        size_B = x_BND.square().mean((1, 2)).sqrt().clamp_min(1e-30)
        y_N = torch.cat([torch.ones(plus_BND.shape[1]), -torch.ones(minus_BND.shape[1])]).double()
        w_BD, b_B = logistic(x_BND / size_B[:, None, None], y_N, settings.ridge, pause)
    length_B = w_BD.norm(dim=-1)
    differs_B &= length_B > 0
    theta_BD = torch.where(differs_B[:, None], w_BD / length_B.clamp_min(1e-30)[:, None], 0.0)
    z_plus, z_minus = ((mean * theta_BD).sum(-1) for mean in (mean_plus, mean_minus))
    threshold_B = (z_plus + z_minus) / 2
    if settings.probe == "logistic":
        threshold_B = (centre_BD * theta_BD).sum(-1) - b_B * size_B / length_B.clamp_min(1e-30)
    sign_B = torch.where(z_plus < z_minus, -1.0, 1.0)
    return Probes(sign_B[:, None] * theta_BD, sign_B * threshold_B)


def logistic(
    x_BND: Tensor, y_N: Tensor, ridge: float, pause: Pause | None = None, *, steps: int = NEWTON_STEPS
) -> tuple[Tensor, Tensor]:
    """Weights (B, D) and intercepts (B,) of B ridge-penalised logistic regressions on the same labels ±1; float64.

    Newton's method, each step halved while it does not lower the loss. Raises ControlError where it does not settle.
    """
    B, N, D = x_BND.shape
    x_BNE = torch.cat([x_BND, x_BND.new_ones(B, N, 1)], dim=-1)
    price_E = torch.full((D + 1,), ridge, dtype=x_BND.dtype)
    price_E[-1] = 0.0  # the intercept is free

    def loss(w_BE: Tensor) -> Tensor:
        margin_BN = y_N * torch.einsum("bne,be->bn", x_BNE, w_BE)
        return torch.nn.functional.softplus(-margin_BN).mean(1) + (price_E * w_BE.square()).sum(-1) / 2

    w_BE = x_BND.new_zeros(B, D + 1)
    for _ in range(steps):
        p_BN = torch.sigmoid(-y_N * torch.einsum("bne,be->bn", x_BNE, w_BE))
        slope_BE = -torch.einsum("bn,bne->be", y_N * p_BN, x_BNE) / N + price_E * w_BE
        if float(slope_BE.abs().max()) <= NEWTON_TOLERANCE:
            return w_BE[:, :-1], w_BE[:, -1]
        weight_BN = p_BN * (1 - p_BN) / N
        curve_BEE = torch.einsum("bn,bne,bnf->bef", weight_BN, x_BNE, x_BNE) + torch.diag(price_E)
        curve_BEE = curve_BEE + 1e-12 * torch.eye(D + 1, dtype=x_BND.dtype)
        step_BE = torch.linalg.solve(curve_BEE, slope_BE)
        before_B, share_B = loss(w_BE), x_BND.new_ones(B)
        for _ in range(30):
            is_worse_B = loss(w_BE - share_B[:, None] * step_BE) > before_B + 1e-15
            if not bool(is_worse_B.any()):
                break
            share_B = torch.where(is_worse_B, share_B / 2, share_B)
        w_BE = w_BE - share_B[:, None] * step_BE
        if pause is not None:
            pause()
    raise ControlError("The logistic probes did not settle: give a larger ridge, or use probe 'mean_difference'.")


def _separation(plus_BN: Tensor, minus_BN: Tensor) -> Tensor:
    """Difference of the class means (B,) over the deviation within the classes."""
    pooled_B = ((plus_BN.var(1, correction=0) + minus_BN.var(1, correction=0)) / 2).sqrt()
    return (plus_BN.mean(1) - minus_BN.mean(1)) / pooled_B.clamp_min(float(pooled_B.max()) * 1e-6 + 1e-30)


def _ranked(accuracy_B: Tensor, separation_B: Tensor) -> Tensor:
    """The heads by accuracy, those that are equal by separation: two stable sorts."""
    order_B = separation_B.argsort(descending=True, stable=True)
    return order_B[accuracy_B[order_B].argsort(descending=True, stable=True)]


def _unseen(probes: Probes, plus_BN: Tensor, minus_BN: Tensor, count: int) -> float | None:
    """Accuracy of the `count` best heads on examples that had no part in ranking them: each half of the measured
    examples ranks for the other. None where a class has fewer than two."""
    if min(plus_BN.shape[1], minus_BN.shape[1]) < 2:
        return None
    found = []
    for own in (0, 1):
        ranks = plus_BN[:, own::2], minus_BN[:, own::2]
        best_K = _ranked(probes.right(*ranks), _separation(*ranks))[:count]
        found.append(float(probes.right(plus_BN[:, 1 - own :: 2], minus_BN[:, 1 - own :: 2])[best_K].mean()))
    return sum(found) / 2


def _quality(best_K: Tensor, random_K: Tensor, all_B: Tensor, is_held: bool, unseen: float | None) -> dict[str, object]:
    """What is told of a plan, and a doubt about it."""
    best, chance, mean = (round(float(x.mean()), 4) for x in (best_K, random_K, all_B))
    quality: dict[str, object] = {
        "measured_on": "held-out" if is_held else "fitted",
        "heads": len(best_K),
        "accuracy": best,
        "random": {"accuracy": chance},
        "mean_accuracy": mean,
    }
    if is_held and unseen is not None:
        quality["accuracy_unseen"] = best = round(unseen, 4)
    if not is_held:
        quality["warning"] = FITTED_ONLY
    elif best < 0.7:
        quality["warning"] = f"The best heads hardly tell the classes apart (accuracy {best:.2f}): give more examples."
    return quality
