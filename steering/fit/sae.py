"""From examples to sparse autoencoders: trained on the tokens of both classes, features ordered by which they tell.

States are read at one tap of the chosen blocks, position 0 and massive activations left out, and one autoencoder is
trained a block (`steering.fit.autoencoder`). Every fifth example of each class takes no part in training.

Quality, per block: explained variance on the tokens of training and on held-out ones, beside that of a random
dictionary which is as large and as sparse (`random`); how many features fire per token and how many never do; and
the AUROC, on held-out examples, of the most selective feature's mean activation, beside the mean over random features,
each turned to its better side. An autoencoder that does not beat the random dictionary has learnt nothing.
Source: Bricken et al. 2023; selectivity: Neural FOXP2, arXiv:2602.00945.   Oracle: `steering.fit.autoencoder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from steering.artifact import MAX_BYTES, checked_name
from steering.errors import SpecError
from steering.fit.autoencoder import CHUNK, Activity, Fidelity, Training, fidelity, random_features, selectivity, train
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
from steering.fit.quality import FITTED_ONLY
from steering.fit.settings import ReadsExamples, chosen_blocks
from steering.fit.units import aurocs
from steering.plan import MAX_RANK, SaePlan
from steering.plan.sae import Autoencoder, SaeTap
from steering.plant.capture import Pause, capture_each
from steering.plant.massive import are_massive
from steering.plant.plant import Plant
from steering.types import Site

MAX_NUMBERS = 2**30
"""Most numbers that the states of one block may be, four gigabytes; of a step's activations an eighth of it."""
HELD_AT_ONCE = 2**31
"""Bytes of states in memory at a time: with more blocks than fit, the examples run again for the others."""
DEAD = 0.9
"""Share of features that never fire beyond which a fit says so."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(ReadsExamples):
    """What training autoencoders needs. Raises SpecError for impossible values.

    Described in their metadata: of docstrings under fields, the schema finds only those of a kind's own class.
    """

    layers: tuple[int, ...] | None = field(
        default=None, metadata={"description": "Blocks; null means the method's own choice."}
    )
    tap: SaeTap = field(
        default="resid_post", metadata={"description": "Site that is read: resid_pre, resid_post, attn_out or mlp_out."}
    )
    features: int | None = field(
        default=None, metadata={"description": "m; null means four times the width, at most 512."}
    )
    l1: float = field(default=0.05, metadata={"description": "Price of activation, in shares of the variance."})
    steps: int = field(default=2000, metadata={"description": "Steps of Adam."})
    batch: int = field(default=256, metadata={"description": "Tokens of a step."})
    lr: float = field(default=2e-3, metadata={"description": "Learning rate."})
    tokens: int = field(default=65_536, metadata={"description": "Most tokens that are read, evenly of all examples."})
    seed: int = field(default=0, metadata={"description": "Of the first weights, the batches and the random controls."})
    positions: PositionRule = field(default="auto", metadata={"description": "Tokens that are read: as for a concept."})
    skip: int = field(
        default=8, metadata={"description": "Leading tokens of a text that are left out; position 0 always is."}
    )

    def __post_init__(self) -> None:
        if self.tap not in get_args(SaeTap):
            raise SpecError("tap", expected=f"one of {', '.join(get_args(SaeTap))}", got=self.tap)
        most = {"features": 2**17, "steps": 100_000, "batch": 8192, "tokens": 2**22}
        for name, limit in most.items():
            value = getattr(self, name)
            if value is None and name == "features":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 2 - (name == "steps") <= value <= limit:
                raise SpecError(name, expected=f"a whole number in {2 - (name == 'steps')}..{limit}", got=value)
        for name, least, limit_ in (("l1", 0.0, 100.0), ("lr", 1e-9, 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not least <= value <= limit_:
                raise SpecError(name, expected=f"a number in [{least:g}, {limit_:g}]", got=value)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**62:
            raise SpecError("seed", expected="a whole number >= 0", got=self.seed)
        self.reading()

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks where none are named: the middle one."""
        return (depth // 2,)

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth, self.default_layers(depth))

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have, for a plan that no file may hold, and for a
        training that would not fit in memory."""
        layers, m = self.chosen(plant.depth), self.training(plant.width).features
        if self.tokens * plant.width > MAX_NUMBERS:
            raise SpecError("tokens", expected=f"at most {MAX_NUMBERS // plant.width} at width {plant.width}")
        if self.batch * m > MAX_NUMBERS // 8:
            raise SpecError("batch", expected=f"at most {MAX_NUMBERS // 8 // m} with {m} features", got=self.batch)
        if 8 * len(layers) * m * (plant.width + 4) > MAX_BYTES:
            expected = f"fewer features, or fewer layers: {m} of width {plant.width} at {len(layers)} pass a gigabyte"
            raise SpecError("features", expected=expected)

    def training(self, width: int) -> Training:
        """The part that trains one autoencoder."""
        m = min(4 * width, 512) if self.features is None else self.features
        return Training(features=m, l1=self.l1, steps=self.steps, lr=self.lr, batch=self.batch, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SaeSettings(TrainingSettings):
    """How the autoencoders of a plan are trained."""


@dataclass(frozen=True, eq=False)
class States:
    """Tokens of one class at one site: x (N, D) float32 on the CPU, and of which example each is (N,)."""

    x_ND: Tensor
    example_N: Tensor
    held_E: Tensor

    def part(self, held: bool) -> Tensor:
        """The tokens of examples that are held out, or of the others."""
        return self.x_ND[self.held_E[self.example_N] == held]

    def means(self, ae: Autoencoder, pause: Pause | None = None) -> Tensor:
        """Mean activation of every feature in every example (E, m), float64."""
        z_Em = torch.zeros(len(self.held_E), len(ae.encoder), dtype=torch.float64)
        for x_TD, example_T in zip(self.x_ND.split(CHUNK), self.example_N.split(CHUNK), strict=True):
            z_Em.index_add_(0, example_T, ae.encode(x_TD).double())
            if pause is not None:
                pause()
        return z_Em / torch.bincount(self.example_N, minlength=len(z_Em)).clamp_min(1)[:, None]


@dataclass(frozen=True, eq=False)
class Trained:
    """The autoencoder of one block with what was measured of it."""

    ae: Autoencoder
    activity: Activity
    selectivity: Tensor
    control: Tensor
    figures: dict[str, float]


def fit_sae(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: SaeSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> SaePlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or SaeSettings()
    checked_name(name)
    settings.for_model(plant)
    layers = settings.chosen(plant.depth)
    classes = checked_classes(positive, negative)
    parts = [
        trained(plant, states, settings, pause, report)
        for _, states, report in per_block(plant, classes, settings, layers, progress, pause)
    ]
    if progress:
        progress("done", 1.0)

    def stacked(of: Callable[[Trained], Tensor]) -> Tensor:
        return torch.stack([of(part).float() for part in parts])

    return SaePlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality_of(parts),
        provenance=provenance(asdict(settings) | {"layers": list(layers)}, classes),
        tap=settings.tap,
        measured="classes",
        layers=layers,
        encoder=stacked(lambda part: part.ae.encoder),
        encoder_bias=stacked(lambda part: part.ae.encoder_bias),
        decoder=stacked(lambda part: part.ae.decoder),
        decoder_bias=stacked(lambda part: part.ae.decoder_bias),
        threshold=stacked(lambda part: part.ae.threshold),
        scale=stacked(lambda part: part.ae.scale),
        peak=stacked(lambda part: part.activity.peak),
        mean=stacked(lambda part: part.activity.mean),
        rate=stacked(lambda part: part.activity.rate),
        selectivity=stacked(lambda part: part.selectivity),
        control=stacked(lambda part: part.control),
    )


def per_block(
    plant: Plant,
    classes: dict[str, list[Example]],
    settings: TrainingSettings,
    layers: tuple[int, ...],
    progress: Progress | None,
    pause: Pause | None,
    *,
    end: float = 1.0,
) -> Iterator[tuple[int, dict[str, States], Callable[[int, int], None]]]:
    """(layer, states by class, what reports the training there) block by block, in few passes over the examples."""
    encoded = {side: encode_class(plant, side, rows, settings.reading(), pause) for side, rows in classes.items()}
    chosen = _thinned(encoded, settings)
    total = sum(len(positions) for side in chosen.values() for positions in side)
    group = max(1, HELD_AT_ONCE // (4 * plant.width * max(total, 1)))
    for start in range(0, len(layers), group):
        part = layers[start : start + group]
        done = end * start / len(layers)
        width = end * len(part) / len(layers)
        states = {}
        for index, (side, rows) in enumerate(encoded.items()):
            begin = done + 0.15 * width * index
            report = part_of(progress, f"states ({side})", begin, begin + 0.15 * width)
            sites = [Site(settings.tap, layer) for layer in part]
            states[side] = _states(plant, [ids for ids, _ in rows], chosen[side], sites, report, pause)
        for index, layer in enumerate(part):
            begin = done + width * (0.3 + 0.7 * index / len(part))
            report = part_of(progress, f"autoencoder {layer}", begin, begin + 0.7 * width / len(part))
            yield layer, {side: states[side][Site(settings.tap, layer)] for side in states}, report


def trained(
    plant: Plant,
    states: dict[str, States],
    settings: TrainingSettings,
    pause: Pause | None,
    progress: Callable[[int, int], None] | None,
) -> Trained:
    """Train one block's autoencoder and measure it. Raises SpecError where the states do not differ at all."""
    fitted = {side: known.part(False) for side, known in states.items()}
    for side, x_ND in fitted.items():
        if not len(x_ND):
            raise SpecError(side, expected="examples with tokens beside position 0 and massive activations")
    x_ND = torch.cat([fitted["positive"], fitted["negative"]])
    if len(x_ND) < 2 or not bool((x_ND != x_ND[0]).any()):
        raise SpecError("positive", expected="examples with tokens that differ, to train an autoencoder on")
    ae = train(x_ND.to(plant.device), settings.training(plant.width), pause, progress)
    plus, minus = (Activity.of(ae, fitted[side], pause) for side in ("positive", "negative"))
    whole = Activity.of(ae, x_ND, pause)
    told_m = selectivity(plus, minus)
    control = random_features(whole.rate, 2 * MAX_RANK, settings.seed)
    held = {side: known.part(True) for side, known in states.items()}
    unseen_ND = torch.cat([held["positive"], held["negative"]])
    seen = fidelity(ae, x_ND, seed=settings.seed + 1, pause=pause)
    unseen = fidelity(ae, unseen_ND, seed=settings.seed + 1, pause=pause) if len(unseen_ND) else None
    figures = _figures(seen, unseen, whole) | _told(ae, states, told_m, control, pause)
    return Trained(ae, whole, told_m, control, figures)


def quality_of(parts: Sequence[Trained]) -> dict[str, Any]:
    """The figures of all blocks, one list each, beside those of the random control."""
    names = [name for name in parts[0].figures if not name.startswith("random_")]
    quality: dict[str, Any] = {name: [round(part.figures[name], 4) for part in parts] for name in names}
    quality["random"] = {
        name: [round(part.figures[f"random_{name}"], 4) for part in parts] for name in ("explained_held_out", "auroc")
    }
    quality["measured_on"] = "held-out" if all(part.figures["held_out_tokens"] for part in parts) else "fitted"
    beaten = [p.figures["explained_held_out"] <= p.figures["random_explained_held_out"] for p in parts]
    if any(beaten):
        quality["warning"] = (
            "An autoencoder rebuilds the states no better than a random dictionary: train it longer, on more examples, "
            "or with a smaller l1."
        )
    elif max(quality["dead"]) > DEAD:
        quality["warning"] = (
            f"{100 * max(quality['dead']):.0f} % of the features never fire: lower l1, or ask for fewer features."
        )
    elif max(quality["auroc"]) <= max(quality["random"]["auroc"]):
        quality["warning"] = (
            "The most selective features tell the classes apart no better than random ones: give more examples, and "
            "clearer ones."
        )
    elif quality["measured_on"] != "held-out":
        quality["warning"] = FITTED_ONLY
    return quality


def _figures(seen: Fidelity, unseen: Fidelity | None, whole: Activity) -> dict[str, float]:
    measured = unseen or seen
    return {
        "explained": seen.explained,
        "explained_held_out": measured.explained,
        "random_explained_held_out": measured.random,
        "active": measured.active,
        "dead": float((whole.rate == 0).double().mean()),
    }


def _told(
    ae: Autoencoder, states: dict[str, States], told_m: Tensor, control: Tensor, pause: Pause | None
) -> dict[str, float]:
    """How well the most selective feature tells the classes, on held-out examples where there are any."""
    z = {side: known.means(ae, pause) for side, known in states.items()}
    on_held = all(bool(known.held_E.any()) for known in states.values())
    if on_held:
        z = {side: z[side][known.held_E] for side, known in states.items()}
    best = int(told_m.argmax())
    drawn = [j for j in control[:64].tolist() if j != best]
    others = aurocs(z["positive"][:, drawn], z["negative"][:, drawn])
    return {
        "auroc": auroc(z["positive"][:, best], z["negative"][:, best]),
        "random_auroc": float(torch.maximum(others, 1 - others).sum()) / max(len(drawn), 1),
        "selectivity": float(told_m[best]),
        "held_out_tokens": float(sum(len(known.part(True)) for known in states.values())) if on_held else 0.0,
    }


def _thinned(
    encoded: dict[str, list[tuple[list[int], Sequence[int]]]], settings: TrainingSettings
) -> dict[str, list[list[int]]]:
    """The positions that are read: all, or an even random share of every example's; position 0 only where alone."""
    chosen = {
        side: [sorted({p for p in positions if p > 0}) or [0] for _, positions in rows]
        for side, rows in encoded.items()
    }
    share = settings.tokens / max(1, sum(len(positions) for side in chosen.values() for positions in side))
    if share >= 1:
        return chosen
    generator = torch.Generator().manual_seed(settings.seed)

    def thin(positions: list[int]) -> list[int]:
        order = torch.randperm(len(positions), generator=generator)[: max(1, math.floor(share * len(positions)))]
        return sorted(positions[i] for i in order.tolist())

    return {side: [thin(positions) for positions in rows] for side, rows in chosen.items()}


def _states(
    plant: Plant,
    prompts: list[list[int]],
    positions: list[list[int]],
    sites: list[Site],
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[Site, States]:
    """The tokens of one class at several sites, in the order of the examples."""
    found: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(prompts) for site in sites}

    def keep(site: Site, n: int, x_TD: Tensor) -> None:
        x_TD = x_TD.float().cpu()
        found[site][n] = x_TD[~are_massive(x_TD).any(-1)]

    capture_each(plant, prompts, sites, keep, positions, progress=progress, pause=pause)
    held_E = held_out(len(prompts))
    states = {}
    for site, rows in found.items():
        example_N = torch.cat([torch.full((len(row),), n) for n, row in enumerate(rows)])
        states[site] = States(torch.cat(rows), example_N, held_E)
    return states
