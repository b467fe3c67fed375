"""From examples to an EigenShift plan: which of the head's eigen-directions tell the two classes apart.

    WᵀW = V Σ² Vᵀ      (D, D) in float64, never the decomposition of W itself nor another copy of it
    a_i = v_i·h,   Δ_i = mean₊ a_i − mean₋ a_i,   s_i² = (var₊ a_i + var₋ a_i) / 2

    signed       Δ_i, after v_i is turned so that the mean of both classes along it is not negative
    separation   |Δ_i| / s_i
    energy       mean₊ a_i² / mean₋ a_i²

h is the final norm's output. The sign of an eigenvector is arbitrary, so a ranking by signed Δ needs the turn: it asks
of which components the positive class has more of what all text has. Means are over examples, energies over tokens.

Both classes are read at the same positions: examples are paired by their number of tokens, and of a pair as many are
read on both sides, counted from where the reading begins. What has no partner is left out.

Quality, on pairs held out of the selection: the chosen components' AUROC and separation along Δ, their share of
‖μ₊ − μ₋‖², and the share of the logits' norm that damping them removes in each class, √(Σ_k σ² E a² / Σ σ² E a²);
beside it the mean of the same over random components (`random`), without which none of these figures means anything.
Source: EigenShift, arXiv:2509.16660, Sec. 3.   Oracle: the SVD of W, and the means formed one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from steering.artifact import checked_name
from steering.errors import SpecError
from steering.fit.concept import (
    PositionRule,
    Progress,
    auroc,
    encode_class,
    held_out,
    part_of,
    provenance,
)
from steering.fit.examples import Example, checked_classes
from steering.fit.settings import ReadsExamples
from steering.plan import MAX_RANK, EigenshiftPlan, Selection
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

FINAL = Site("final", 0)
SILENT = 1e-6
"""Eigen-directions whose σ is below this share of the largest reach no logit and are not chosen."""
DRAWS = 32
"""Random sets of components that the control is averaged over."""
Encoded = tuple[list[int], Sequence[int]]
"""Token ids of an example and the positions that are read."""


@dataclass(frozen=True, kw_only=True)
class EigenshiftSettings(ReadsExamples):
    """How the components are chosen. Raises SpecError for impossible values."""

    selection: Selection = "separation"
    """`signed`, `separation` or `energy`: see above."""
    components: int = 32
    """k, how many are chosen."""
    positions: PositionRule = "auto"
    """Tokens that are read: as for a concept."""
    skip: int = 8
    """Leading tokens of a text that are left out."""
    seed: int = 0
    """Of the random components."""

    def __post_init__(self) -> None:
        if self.selection not in get_args(Selection):
            raise SpecError("selection", expected=f"one of {', '.join(get_args(Selection))}", got=self.selection)
        if isinstance(self.components, bool) or not 1 <= self.components <= MAX_RANK:
            raise SpecError("components", expected=f"1 to {MAX_RANK}", got=self.components)
        self.reading()


@dataclass(frozen=True, eq=False)
class Activations:
    """What is known of one class at one place: example means (N, D), and E[h hᵀ] over tokens (D, D); float64."""

    mean_ND: Tensor
    moment_DD: Tensor

    def energy(self, V_DK: Tensor) -> Tensor:
        """E[(v·h)²] (K,) for the columns of V."""
        return ((self.moment_DD @ V_DK) * V_DK).sum(0).clamp_min(0)


def fit_eigenshift(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: EigenshiftSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> EigenshiftPlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or EigenshiftSettings()
    checked_name(name)
    classes = checked_classes(positive, negative)
    encoded = [encode_class(plant, side, rows, settings.reading(), pause) for side, rows in classes.items()]
    pairs = matched(*encoded)
    held = held_out(len(pairs[0]))
    read = []
    for side, rows, start in zip(classes, pairs, (0.0, 0.4), strict=True):
        read.append(_activations(plant, rows, held, part_of(progress, f"states ({side})", start, start + 0.4), pause))
    fitted, measured = zip(*read, strict=True)

    if progress:
        progress("head", 0.8)
    sigma_D, V_DD = eigen_directions(plant, pause)
    statistics = _statistics(V_DD, *fitted)
    usable = torch.nonzero(sigma_D > SILENT * sigma_D[0]).flatten()
    if not bool((statistics["shift"][usable] != 0).any()):
        raise SpecError("positive", expected="examples that differ from the negative ones", advice="their means agree")
    score_D = {"signed": "oriented", "separation": "separation", "energy": "energy"}[settings.selection]
    k = min(settings.components, len(usable))
    chosen = usable[statistics[score_D][usable].argsort(descending=True, stable=True)[:k]]
    generator = torch.Generator().manual_seed(settings.seed)
    control = _random(usable, chosen, k, generator)

    def figures(index: Tensor) -> dict[str, float]:
        return _figures(index, V_DD, sigma_D, statistics["shift"], *measured)

    draws = [figures(_random(usable, chosen, k, generator)) for _ in range(DRAWS)]
    quality = {
        "measured_on": "held-out" if bool(held.any()) else "fitted",
        **_rounded(figures(chosen)),
        "random": _rounded({name: sum(d[name] for d in draws) / DRAWS for name in draws[0]}),
        "pairs": len(pairs[0]),
        "tokens": sum(len(chosen_positions) for _, chosen_positions in pairs[0]),
    }
    if progress:
        progress("done", 1.0)
    return EigenshiftPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance=provenance(asdict(settings), classes),
        selection=settings.selection,
        basis=V_DD[:, chosen].mT.float().contiguous(),
        sigma=sigma_D[chosen].float(),
        shift=statistics["shift"][chosen].float(),
        pooled=statistics["pooled"][chosen].float(),
        control=V_DD[:, control].mT.float().contiguous(),
        control_shift=statistics["shift"][control].float(),
    )


def matched(positive: Sequence[Encoded], negative: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    """Pairs of examples with equally many positions, shortest first, spread over the larger class."""
    count = min(len(positive), len(negative))
    sides = []
    for rows in (positive, negative):
        ordered = sorted(rows, key=lambda row: len(row[1]))
        sides.append([ordered[i * len(ordered) // count] for i in range(count)])
    lengths = [min(len(a[1]), len(b[1])) for a, b in zip(*sides, strict=True)]
    cut: list[list[Encoded]] = [
        [(ids, list(chosen)[:n]) for (ids, chosen), n in zip(side, lengths, strict=True)] for side in sides
    ]
    return cut[0], cut[1]


def eigen_directions(plant: Plant, pause: Pause | None = None) -> tuple[Tensor, Tensor]:
    """σ (D,), descending, and V (D, D), one direction a column, of the head; float64 on the CPU."""
    square_D, V_DD = torch.linalg.eigh(head_gram(plant, pause))
    return square_D.flip(0).clamp_min(0).sqrt(), V_DD.flip(1)


def head_gram(plant: Plant, pause: Pause | None = None, *, chunk: int = 4096) -> Tensor:
    """WᵀW (D, D) in float64, on the CPU, summed over `chunk` words at a time.

    Of a head that is no plain matrix (quantised, sharded) only products are asked: its answer to the unit vectors.
    """
    head = plant.model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if type(head) is nn.Linear and type(weight) in (nn.Parameter, Tensor):
        gram_DD = torch.zeros(plant.width, plant.width, dtype=torch.float64, device=weight.device)
        for start in range(0, len(weight), chunk):
            rows = weight[start : start + chunk].detach().double()
            gram_DD += rows.mT @ rows
            if pause is not None:
                pause()
        return gram_DD.cpu()
    return _gram_by_products(head, plant, pause)


def _gram_by_products(head: Callable[[Tensor], Tensor], plant: Plant, pause: Pause | None, *, wide: int = 64) -> Tensor:
    """WᵀW from W e_i, `wide` columns against `wide` columns at a time; a bias is taken off."""
    gram_DD = torch.zeros(plant.width, plant.width, dtype=torch.float64)
    eye_DD = torch.eye(plant.width, dtype=plant.dtype, device=plant.device)
    with torch.no_grad():
        bias_V = head(torch.zeros_like(eye_DD[:1])).double()
        for i in range(0, plant.width, wide):
            left_KV = head(eye_DD[i : i + wide]).double() - bias_V
            for j in range(0, i + 1, wide):
                right_KV = left_KV if j == i else head(eye_DD[j : j + wide]).double() - bias_V
                block = (left_KV @ right_KV.mT).cpu()
                gram_DD[i : i + wide, j : j + wide] = block
                gram_DD[j : j + wide, i : i + wide] = block.mT
                if pause is not None:
                    pause()
    return gram_DD


def _activations(
    plant: Plant, rows: Sequence[Encoded], held: Tensor, progress: Callable[[int, int], None], pause: Pause | None
) -> tuple[Activations, Activations]:
    """The activations of a class that are fitted on and those that are measured on: the same where none is held out."""
    D = plant.width
    mean_ND = torch.zeros(len(rows), D, dtype=torch.float64)
    moment_2DD = torch.zeros(2, D, D, dtype=torch.float64)
    count_2 = [0, 0]

    def keep(_: Site, n: int, h_TD: Tensor) -> None:
        h_TD = h_TD.double().cpu()
        mean_ND[n] = h_TD.mean(0)
        part = int(held[n])
        moment_2DD[part] += h_TD.mT @ h_TD
        count_2[part] += len(h_TD)

    ids, positions = [row[0] for row in rows], [row[1] for row in rows]
    capture_each(plant, ids, [FINAL], keep, positions, progress=progress, pause=pause)
    fitted = Activations(mean_ND[~held], moment_2DD[0] / count_2[0])
    return fitted, Activations(mean_ND[held], moment_2DD[1] / count_2[1]) if bool(held.any()) else fitted


def _statistics(V_DD: Tensor, plus: Activations, minus: Activations) -> dict[str, Tensor]:
    """Per eigen-direction: shift Δ, pooled deviation, and the three scores; (D,) each."""
    a_plus, a_minus = plus.mean_ND @ V_DD, minus.mean_ND @ V_DD
    mean_plus, mean_minus = a_plus.mean(0), a_minus.mean(0)
    shift = mean_plus - mean_minus
    pooled = ((a_plus.var(0, correction=0) + a_minus.var(0, correction=0)) / 2).sqrt()
    energy_plus, energy_minus = plus.energy(V_DD), minus.energy(V_DD)
    return {
        "shift": shift,
        "pooled": pooled,
        "oriented": torch.where(mean_plus + mean_minus < 0, -shift, shift),
        "separation": shift.abs() / pooled.clamp_min(float(pooled.max()) * 1e-6 + 1e-30),
        "energy": energy_plus / energy_minus.clamp_min(float(energy_minus.max()) * 1e-12 + 1e-30),
    }


def _figures(
    index: Tensor, V_DD: Tensor, sigma_D: Tensor, shift_D: Tensor, plus: Activations, minus: Activations
) -> dict[str, float]:
    """What a set of components is worth, on the examples of `plus` and `minus`; Δ is the fitted one."""
    w_D = V_DD[:, index] @ shift_D[index]
    z_plus, z_minus = plus.mean_ND @ w_D, minus.mean_ND @ w_D
    pooled = ((z_plus.var(0, correction=0) + z_minus.var(0, correction=0)) / 2).sqrt().clamp_min(1e-30)
    figures = {
        "auroc": auroc(z_plus, z_minus),
        "separation": float((z_plus.mean() - z_minus.mean()) / pooled),
        "shift_share": float(shift_D[index].square().sum() / shift_D.square().sum()),
    }
    for side, known in (("positive", plus), ("negative", minus)):
        part_D = sigma_D.square() * known.energy(V_DD)
        figures[f"logit_share_{side}"] = float((part_D[index].sum() / part_D.sum().clamp_min(1e-30)).sqrt())
    return figures


def _random(usable: Tensor, chosen: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k random components, none of the chosen ones where enough others are left."""
    others = usable[~torch.isin(usable, chosen)]
    pool = others if len(others) >= k else usable
    return pool[torch.randperm(len(pool), generator=generator)[:k]]


def _rounded(figures: dict[str, float]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items()}
