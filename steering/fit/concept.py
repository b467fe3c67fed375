"""From examples to a concept: directions by difference of means, then gains on the layer Jacobians.

    E_l = mean₊ x_l − mean₋ x_l,     v_l = E_l / ‖E_l‖,     origin_l = v_l · mean₋ x_l            l = 0 … L
    w_l = K_l v_l                                                                         l in the controlled layers

x_l is averaged over the chosen positions of each example, then over examples. A layer where the classes do not differ
(‖E_l‖ below float32 noise of the states) has a zero direction. Layer 0 is left out of control by default: its Jacobian
is one to two orders larger than any other's, since the embedding's norm is small beside what the first block writes.

Quality is measured on examples held out of the means: the area under the ROC curve of v_l·x per layer, the separation
(difference of means over the pooled standard deviation), and the cosine between directions fitted on two halves.
Source: A-LQR, arXiv:2604.19018 (feature directions and setpoints).   Oracle: the means formed one example at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from steering.artifact import checked_name
from steering.concept import Concept
from steering.control import Weights, output_regulate, regulate_along
from steering.errors import PlantError, SpecError
from steering.fit.examples import Example, checked_classes, encode_example
from steering.fit.units import aurocs
from steering.plant.capture import Pause, capture_means, state_sites
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.types import Gains

PositionRule = Literal["auto", "answer", "late", "last", "all"]
Progress = Callable[[str, float], None]
"""Called with the stage's name and the fraction done, 0 to 1, of the whole fit."""

HELD_OUT = 0.2
"""Share of the examples of each class that measure quality and enter no mean."""
LINEAR_CONTEXT = 64
"""Tokens of each example along which the blocks are linearised, counted back from the one that is read."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a concept is fitted. Raises SpecError or ControlError for impossible values."""

    gains: tuple[Gains, ...] = ("dense",)
    """Gains to fit; the first is the concept's default."""
    q: float = 1.0
    """Price of the error at every controlled layer's input."""
    r: float = 1.0
    """Price of the control."""
    q_f: float = 1.0
    """Price of the error after the last controlled layer."""
    jacobian_prompts: int = 16
    """Examples along which the blocks are linearised, half of each class."""
    positions: PositionRule = "auto"
    """Tokens that are averaged: see `encode_example`."""
    skip: int = 8
    """Leading tokens of a text that `all` leaves out: position 0 swamps every mean, early tokens know little yet."""
    layers: tuple[int, ...] | None = None
    """Controlled blocks, consecutive; null means all but block 0."""

    def __post_init__(self) -> None:
        if not self.gains or any(kind not in get_args(Gains) for kind in self.gains):
            raise SpecError("gains", expected=f"one or more of {', '.join(get_args(Gains))}", got=list(self.gains))
        if self.positions not in get_args(PositionRule):
            raise SpecError("positions", expected=f"one of {', '.join(get_args(PositionRule))}", got=self.positions)
        if not 1 <= self.jacobian_prompts <= 1024:
            raise SpecError("jacobian_prompts", expected="1 to 1024", got=self.jacobian_prompts)
        if self.skip < 0:
            raise SpecError("skip", expected="a number >= 0", got=self.skip)
        Weights(self.q, self.r, self.q_f)

    def controlled(self, depth: int) -> range:
        """The controlled blocks of a model with `depth` blocks."""
        if self.layers is None:
            return range(min(1, depth - 1), depth)
        layers = sorted(set(self.layers))
        if not layers or layers[0] < 0 or layers[-1] >= depth:
            raise SpecError("layers", expected=f"layers in 0..{depth - 1}", got=list(self.layers))
        if layers != list(range(layers[0], layers[-1] + 1)):
            raise SpecError("layers", expected="consecutive layers", got=list(self.layers))
        return range(layers[0], layers[-1] + 1)


def fit_concept(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> Concept:
    """Fit one concept.

    `pause` is called between pieces of work that are small beside the whole, so that a fit can give way to others. What
    it or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named), PlantError (a chat for a model without a template),
    ControlError (no usable gain).
    """
    settings = settings or FitSettings()
    checked_name(name)
    layers = settings.controlled(plant.depth)
    classes = checked_classes(positive, negative)

    encoded = {side: encode_class(plant, side, rows, settings, pause) for side, rows in classes.items()}
    filled = sum(len(ids) >= plant.context for rows in encoded.values() for ids, _ in rows)
    states = {
        side: _states(plant, rows, part_of(progress, f"states ({side})", start, start + 0.3), pause)
        for (side, rows), start in zip(encoded.items(), (0.0, 0.3), strict=True)
    }
    if plant.layout.norm == "layer":
        # LayerNorm takes the mean over coordinates from whatever it reads, so no direction may have one.
        states = {side: x_NLD - x_NLD.mean(-1, keepdim=True) for side, x_NLD in states.items()}
    held = {side: held_out(len(x)) for side, x in states.items()}
    direction, magnitude, origin = difference_of_means(
        states["positive"][~held["positive"]], states["negative"][~held["negative"]]
    )
    if not direction[layers.start :].any():
        raise SpecError(
            "positive", expected="examples that differ from the negative ones", advice="the classes have equal means"
        )
    quality = _quality(direction, states, held)

    weights = Weights(settings.q, settings.r, settings.q_f)
    computed = [kind for kind in dict.fromkeys(settings.gains) if kind != "identity"]
    gains: dict[str, Tensor] = {}
    products: dict[str, int] = {}
    if computed:
        prompts = _jacobian_prompts(encoded, settings.jacobian_prompts)
        context = min(LINEAR_CONTEXT, plant.context)
        linear = Linearisation(
            plant, prompts, max_context=context, progress=part_of(progress, "prefixes", 0.6, 0.65), pause=pause
        )
        for index, kind in enumerate(computed):
            start, end = (0.65 + 0.35 * (index + done) / len(computed) for done in (0, 1))
            before = linear.products
            gains[kind] = gains_along(
                linear, kind, direction, weights, layers, part_of(progress, f"gains ({kind})", start, end)
            )
            products[kind] = linear.products - before
    concept = Concept(
        name,
        plant.fingerprint,
        direction,
        magnitude,
        origin,
        gains,
        tuple(layers),
        weights,
        settings.gains[0],
        {**quality, "jacobian_products": products, "filled_context": filled},
        provenance(asdict(settings), classes),
    )
    if not gains:
        concept = replace(concept, gains={"identity": concept.gain("identity")})
    if progress:
        progress("done", 1.0)
    return concept


def encode_class(
    plant: Plant, side: str, rows: Sequence[Example], settings: FitSettings, pause: Pause | None = None
) -> list[tuple[list[int], Sequence[int]]]:
    """Token ids and chosen positions of every example of a class. Raises SteeringError that names the row."""
    encoded = []
    for row, example in enumerate(rows):
        where = f"{side}[{row}]"
        try:
            encoded.append(encode_example(plant, where, example, settings.positions, settings.skip))
        except PlantError as error:
            error.param = where
            raise
        if pause is not None:
            pause()
    return encoded


def difference_of_means(positive_NLD: Tensor, negative_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions v (L+1, D), magnitudes ‖E‖ (L+1,) and origins v·μ₋ (L+1,), float32, from states (N, L+1, D)."""
    mu_plus, mu_minus = positive_NLD.double().mean(0), negative_NLD.double().mean(0)
    E_LD = mu_plus - mu_minus
    magnitude_L = E_LD.norm(dim=-1)
    noise_L = 1e-6 * torch.maximum(mu_plus.norm(dim=-1), mu_minus.norm(dim=-1))
    differs_L = magnitude_L > noise_L
    direction_LD = torch.where(differs_L[:, None], E_LD / magnitude_L.clamp_min(1e-30)[:, None], 0.0)
    origin_L = (direction_LD * mu_minus).sum(-1)
    return direction_LD.float(), torch.where(differs_L, magnitude_L, 0.0).float(), origin_L.float()


def auroc(positive_N: Tensor, negative_N: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in the right order, ties counted half (Mann–Whitney)."""
    return float(aurocs(positive_N[:, None], negative_N[:, None]))


def part_of(progress: Progress | None, stage: str, start: float, end: float) -> Callable[[int, int], None]:
    """What reports (done, of) of one stage as the part from `start` to `end` of the whole."""
    return lambda done, of: progress(stage, start + (end - start) * done / max(of, 1)) if progress else None


def provenance(settings: dict[str, Any], classes: dict[str, list[Example]]) -> dict[str, Any]:
    """What an artifact tells of how it was fitted."""
    counts = {side: len(rows) for side, rows in classes.items()}
    return {"settings": settings, "data": data_hash(classes), "examples": counts}


def data_hash(classes: dict[str, list[Example]]) -> str:
    """SHA-256 of the examples."""
    return f"sha256:{hashlib.sha256(json.dumps(classes, sort_keys=True).encode()).hexdigest()}"


def _states(
    plant: Plant,
    rows: list[tuple[list[int], Sequence[int]]],
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> Tensor:
    """Mean states (N, L+1, D) of encoded examples."""
    sites = state_sites(plant)
    means = capture_means(
        plant, [ids for ids, _ in rows], sites, [chosen for _, chosen in rows], progress=progress, pause=pause
    )
    return torch.stack([means[site] for site in sites], dim=1)


def held_out(count: int) -> Tensor:
    """Boolean (N,): every fifth example, none where fewer than ten would leave nothing to measure."""
    held = torch.zeros(count, dtype=torch.bool)
    if count >= 2 / HELD_OUT:
        held[:: round(1 / HELD_OUT)] = True
    return held


def _quality(direction_LD: Tensor, states: dict[str, Tensor], held: dict[str, Tensor]) -> dict[str, Any]:
    """AUROC and separation per layer on held-out examples (on the fitted ones, and marked so, where there are none)."""
    measured_on = "held-out" if bool(held["positive"].any()) and bool(held["negative"].any()) else "fitted"
    scores = {
        side: torch.einsum("nld,ld->nl", x[held[side]] if measured_on == "held-out" else x, direction_LD)
        for side, x in states.items()
    }
    plus, minus = scores["positive"], scores["negative"]
    pooled = ((plus.var(0, correction=0) + minus.var(0, correction=0)) / 2).sqrt().clamp_min(1e-12)
    halves = [difference_of_means(states["positive"][part::2], states["negative"][part::2])[0] for part in range(2)]
    return {
        "measured_on": measured_on,
        "auroc": [round(auroc(plus[:, layer], minus[:, layer]), 4) for layer in range(direction_LD.shape[0])],
        "separation": [round(float(s), 4) for s in (plus.mean(0) - minus.mean(0)) / pooled],
        "split_half_cosine": [round(float(c), 4) for c in (halves[0] * halves[1]).sum(-1)],
    }


def _jacobian_prompts(encoded: dict[str, list[tuple[list[int], Sequence[int]]]], count: int) -> list[list[int]]:
    """Prefixes that end at a token the fit read, half of each class, evenly spread over the examples."""
    prompts = []
    for side, share in (("positive", (count + 1) // 2), ("negative", count // 2)):
        rows = encoded[side]
        for i in range(min(share, len(rows))):
            ids, chosen = rows[i * len(rows) // min(share, len(rows))]
            # The middle of what was read: the end of an example is often its end-of-text token, which nothing follows.
            prompts.append(ids[: chosen[len(chosen) // 2] + 1])
    return prompts


def gains_along(
    linear: Linearisation,
    kind: Gains,
    direction_LD: Tensor,
    weights: Weights,
    layers: range,
    progress: Callable[[int, int], None],
) -> Tensor:
    """w (L, D) float32, the gains of one concept's directions (L + 1, D), zero rows outside `layers`.

    `dense` from the Jacobians, else from products with them (`steering.control`).
    """
    v_LD = direction_LD[layers.start : layers.stop + 1]
    if kind == "dense":
        stream = (A for _, A in linear.jacobians(layers, progress=progress))
        w_LD = regulate_along(stream, v_LD, weights, last_layer=layers[-1])
    else:
        w_LD = output_regulate(_reported(linear, len(layers), progress), v_LD, weights, layers).w_LD
    whole = torch.zeros(direction_LD.shape[0] - 1, direction_LD.shape[1])
    whole[layers.start : layers.stop] = w_LD.float()
    return whole


def _reported(
    linear: Linearisation, n_layers: int, progress: Callable[[int, int], None]
) -> Callable[[int, Tensor], Tensor]:
    """The products of a recursion over `n_layers`, reported as parts of the most that it can take."""
    rows, most = 0, n_layers * (n_layers + 1) // 2

    def pull(layer: int, W_KD: Tensor) -> Tensor:
        nonlocal rows
        before = rows
        rows += len(W_KD)
        return linear.vjp(layer, W_KD, progress=lambda done, of: progress(before * of + len(W_KD) * done, most * of))

    return pull
