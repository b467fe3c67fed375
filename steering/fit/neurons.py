"""From examples to a plan of neurons: which single units of a site tell the classes apart, or vary without reason.

    auroc             AUROC_m − ½ of z_m = max over an example's tokens of unit m            AurA, Det-0, Damp
    mean_difference   (mean₊ z_m − mean₋ z_m) · ‖W_down[:, m]‖, z_m a mean over tokens       its part in the residual
    sensitivity       V_m of `steering.fit.sensitivity`, averaged over the positive prompts  SenD

Units are the inputs of the MLP's last map (`mlp_act`) unless said otherwise; a block's output for `sensitivity`, by
default the last block's but one. Left out are position 0, massive tokens, and dimensions whose mean is above 50 times
the site's median: they are the same in every text, and a model without them is none. `auroc` keeps what the positive
class has more of, `mean_difference` both signs.

Quality, on examples held out of the choice: the mean AUROC of the chosen units, each in the direction that the fit saw,
beside that of as many random units of the same blocks, which the plan also holds as its control. For `sensitivity` the
share of all V that the units hold on held-out prompts, and the eigenscore with and without them.
Shapes: z (N, E) of a block at a time; groups of blocks are read together as memory allows.
Source: AurA, arXiv:2407.12824, Sec. 3; SenD, arXiv:2410.15460.   Oracle: scipy's Mann–Whitney U, unit by unit.
Of the published code we leave: ties counted as the sort happens to leave them, and a maximum over the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from steering.artifact import checked_name
from steering.errors import SpecError
from steering.fit.concept import PositionRule, Progress, encode_class, held_out, part_of, provenance
from steering.fit.examples import Example, checked_classes
from steering.fit.quality import FITTED_ONLY
from steering.fit.sensitivity import Answers, Varied, eigenscore, varied_states
from steering.fit.settings import ReadsExamples, chosen_blocks
from steering.fit.units import aurocs, massive_units, ordinary, without_position_0
from steering.plan.neurons import MAX_UNITS, NeuronScore, NeuronSite, NeuronsPlan
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

MAX_STEPS = 2**16
"""Most decode steps of all prompts together: a quarter of an hour on the embedded model."""
GROUP_BYTES = 2**29
"""Most that the statistics of one group of blocks may take: beyond it the examples are run again for the rest."""


@dataclass(frozen=True, kw_only=True)
class NeuronsSettings(ReadsExamples):
    """Which units are stored. Raises SpecError for impossible values."""

    method: NeuronScore = "auroc"
    """`auroc`, `mean_difference` or `sensitivity`: see above."""
    site: NeuronSite | None = None
    """`mlp_act`, `mlp_out` or `resid_post`; null means `resid_post` for `sensitivity`, else `mlp_act`."""
    layers: tuple[int, ...] | None = None
    """Blocks that are searched; null means the last but one for `sensitivity`, else all."""
    top: int | None = None
    """How many units are stored, over all blocks; null means 256, or for `sensitivity` a fifth of them."""
    positions: PositionRule = "auto"
    """Tokens that are read: as for a concept."""
    skip: int = 8
    """Leading tokens of a text that are left out."""
    source: Literal["samples", "positions"] = "samples"
    """For `sensitivity`: whether states vary over answers that the model draws, or over the positions of a text."""
    samples: int = 10
    """K, answers drawn to each positive prompt."""
    temperature: float = 0.5
    """Of those answers."""
    tokens: int = 32
    """Most tokens of an answer."""
    seed: int = 0
    """Of the random units, and of the answers."""

    def __post_init__(self) -> None:
        for name, allowed in (("method", NeuronScore), ("site", NeuronSite)):
            if getattr(self, name) not in (*get_args(allowed), *([None] if name == "site" else ())):
                expected = f"one of {', '.join(get_args(allowed))}"
                raise SpecError(name, expected=expected, got=getattr(self, name))
        if self.source not in ("samples", "positions"):
            raise SpecError("source", expected="samples or positions", got=self.source)
        for name, least, most in (("top", 1, MAX_UNITS), ("samples", 2, 64), ("tokens", 1, 512)):
            value = getattr(self, name)
            if (value is not None or name != "top") and (type(value) is not int or not least <= value <= most):
                raise SpecError(name, expected=f"{least} to {most}", got=value)
        if not 0.01 <= self.temperature <= 10:  # below, float32 logits may overflow
            raise SpecError("temperature", expected="a number in [0.01, 10]", got=self.temperature)
        self.reading()

    @property
    def place(self) -> NeuronSite:
        """The site with its default."""
        return self.site or ("resid_post" if self.method == "sensitivity" else "mlp_act")

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth, (max(depth - 2, 0),) if self.method == "sensitivity" else None)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block, PlantError for a site that the model does not have."""
        for layer in self.chosen(plant.depth):
            plant.width_of(Site(self.place, layer))


@dataclass(eq=False)
class Class:
    """What is known of one class at one site: z (N, E) an example a row, and sums over tokens."""

    z_NE: Tensor
    sum_E: Tensor
    square_E: Tensor
    count: int = 0

    @classmethod
    def empty(cls, examples: int, width: int) -> Class:
        """Nothing read yet."""
        return cls(torch.zeros(examples, width), *torch.zeros(2, width, dtype=torch.float64))

    def add(self, n: int, x_TE: Tensor, *, largest: bool) -> None:
        """Take in what was read of example n; z is its largest or its mean value."""
        x_TE = ordinary(x_TE.float().cpu())
        self.z_NE[n] = x_TE.amax(0) if largest else x_TE.mean(0)
        x_TE = x_TE.double()
        self.sum_E += x_TE.sum(0)
        self.square_E += x_TE.square().sum(0)
        self.count += len(x_TE)

    @property
    def mean(self) -> Tensor:
        """Mean over tokens."""
        return self.sum_E / self.count

    @property
    def variance(self) -> Tensor:
        """Variance over tokens."""
        return (self.square_E / self.count - self.mean.square()).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one block, or of all side by side: numbers (E,) of each, float64."""

    layer: Tensor
    index: Tensor
    score: Tensor
    auroc: Tensor
    auroc_held: Tensor
    positive: Tensor
    negative: Tensor
    deviation: Tensor
    massive: Tensor


def fit_neurons(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: NeuronsSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> NeuronsPlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a site that the model does not have, a chat for
    a model without a template).
    """
    settings = settings or NeuronsSettings()
    checked_name(name)
    settings.for_model(plant)
    sites = [Site(settings.place, layer) for layer in settings.chosen(plant.depth)]
    classes = checked_classes(positive, negative)
    draws = settings.method == "sensitivity" and settings.source == "samples"
    if draws and len(positive) * settings.tokens > MAX_STEPS:
        expected = f"at most {MAX_STEPS // len(positive)} for {len(positive)} prompts, or fewer prompts"
        raise SpecError("tokens", expected=expected, got=settings.tokens)
    encoded = {
        side: without_position_0(encode_class(plant, side, rows, settings.reading(), pause))
        for side, rows in classes.items()
    }
    varied: dict[Site, Varied] = {}
    start = 0.0
    if settings.method == "sensitivity":
        start = 0.7
        answers = None
        if draws:
            answers = Answers(settings.samples, settings.tokens, settings.temperature, settings.seed)
        report = part_of(progress, settings.source, 0.0, start)
        varied = varied_states(plant, classes["positive"], encoded["positive"], sites, answers, report, pause)
    groups = _groups(plant, sites, sum(len(rows) for rows in encoded.values()))
    parts = []
    for i, group in enumerate(groups):
        ends = (start + (1 - start) * (i + done) / len(groups) for done in (0, 1))
        read = _read(plant, encoded, group, settings.method == "auroc", part_of(progress, "units", *ends), pause)
        parts += [_units(plant, site, *read[site], settings.method, varied.get(site)) for site in group]
    joined: list[Tensor] = [torch.cat([getattr(part, field) for part in parts]) for field in Units.__annotations__]
    units = Units(*joined)
    chosen = _chosen(units, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    control = _control(units, chosen, generator)
    held = {side: bool(held_out(len(rows)).any()) for side, rows in classes.items()}
    quality: dict[str, Any] = {
        "measured_on": "held-out" if all(held.values()) else "fitted",
        **_figures(units, chosen, sites, varied),
        "random": _figures(units, control, sites, varied),
        "units": len(units.score),
        "massive": int(units.massive.sum()),
    }
    if quality["measured_on"] != "held-out":
        quality["warning"] = FITTED_ONLY
    elif varied:
        if quality["sensitivity_share"] <= quality["random"]["sensitivity_share"]:
            quality["warning"] = (
                "The chosen units vary no more than random ones on prompts not seen: give more prompts."
            )
    elif quality["auroc"] <= quality["random"]["auroc"]:
        quality["warning"] = "The chosen units tell the classes apart no better than random ones: give more examples."
    if progress:
        progress("done", 1.0)
    is_massive = units.massive.bool()
    return NeuronsPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance=provenance(asdict(settings) | {"layers": [site.layer for site in sites]}, classes),
        site=settings.place,
        method=settings.method,
        layers=tuple(site.layer for site in sites),
        spans=tuple(plant.width_of(site) for site in sites),
        control=units.index[control].float(),
        control_negative=units.negative[control].float(),
        massive=torch.stack([units.layer[is_massive], units.index[is_massive]], dim=1).float(),
        **{
            field: getattr(units, field)[chosen].float()
            for field in ("layer", "index", "score", "auroc", "positive", "negative", "deviation")
        },
    )


def _groups(plant: Plant, sites: Sequence[Site], examples: int) -> list[list[Site]]:
    """Sites that are read in one run over the examples, in order."""
    groups: list[list[Site]] = []
    held = GROUP_BYTES + 1
    for site in sites:
        size = 4 * examples * plant.width_of(site)
        if held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += size
    return groups


def _read(
    plant: Plant,
    encoded: dict[str, Any],
    sites: Sequence[Site],
    largest: bool,
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[Site, tuple[Class, Class]]:
    """Both classes at some sites, positive first."""
    read = []
    total = sum(len(rows) for rows in encoded.values())
    for before, rows in zip((0, len(encoded["positive"])), encoded.values(), strict=True):
        found = {site: Class.empty(len(rows), plant.width_of(site)) for site in sites}
        capture_each(
            plant,
            [ids for ids, _ in rows],
            sites,
            lambda site, n, x_TE, found=found: found[site].add(n, x_TE, largest=largest),  # type: ignore[misc]
            [chosen for _, chosen in rows],
            progress=lambda done, _, before=before: progress(before + done, total),  # type: ignore[misc]
            pause=pause,
        )
        read.append(found)
    return {site: (read[0][site], read[1][site]) for site in sites}


def _units(plant: Plant, site: Site, plus: Class, minus: Class, method: NeuronScore, varied: Varied | None) -> Units:
    """The statistics of one block's units."""
    width = plus.z_NE.shape[1]
    fitted, held = (
        [c.z_NE[part(held_out(len(c.z_NE)))] for c in (plus, minus)] for part in (torch.logical_not, torch.clone)
    )
    auroc_E = aurocs(*fitted)
    score_E = auroc_E - 0.5
    if method == "mean_difference":
        score_E = (fitted[0].double().mean(0) - fitted[1].double().mean(0)) * _reach(plant, site)
    elif method == "sensitivity":
        score_E = cast("Varied", varied).fitted_E
    return Units(
        layer=torch.full((width,), float(site.layer), dtype=torch.float64),
        index=torch.arange(width, dtype=torch.float64),
        score=score_E,
        auroc=auroc_E,
        auroc_held=aurocs(*held) if all(map(len, held)) else auroc_E,
        positive=plus.mean,
        negative=minus.mean,
        deviation=((plus.variance + minus.variance) / 2).sqrt(),
        massive=massive_units(minus.mean).double(),
    )


def _reach(plant: Plant, site: Site) -> Tensor:
    """How long a step of the residual one unit's step is, (E,); 1 where the units are the residual's own."""
    if site.tap != "mlp_act":
        return torch.ones(plant.width_of(site), dtype=torch.float64)
    (down_DE,) = plant.linears_at(site)
    return down_DE.double().norm(dim=0)


def _chosen(units: Units, settings: NeuronsSettings) -> Tensor:
    """The units that are stored, best first. Raises SpecError where the classes do not differ."""
    rank = units.score.abs() if settings.method == "mean_difference" else units.score
    usable = torch.nonzero((rank > 0) & (units.massive == 0)).flatten()
    if not len(usable):
        raise SpecError("positive", expected="examples on which some unit differs from the negative ones")
    top = settings.top or (max(1, len(units.score) // 5) if settings.method == "sensitivity" else 256)
    return usable[rank[usable].argsort(descending=True, stable=True)[:top]]


def _control(units: Units, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit of the same block for each chosen one; none of the chosen where there are enough others."""
    control = torch.empty_like(chosen)
    for layer in units.layer[chosen].unique():
        places = units.layer[chosen] == layer
        count = int(places.sum())
        whole = torch.nonzero((units.layer == layer) & (units.massive == 0)).flatten()
        others = whole[~torch.isin(whole, chosen)]
        pool = others if len(others) >= count else whole
        control[places] = pool[torch.randperm(len(pool), generator=generator)[:count]]
    return control


def _figures(units: Units, index: Tensor, sites: Sequence[Site], varied: dict[Site, Varied]) -> dict[str, float]:
    """What a set of units is worth on held-out examples."""
    seen, held = units.auroc[index], units.auroc_held[index]
    figures = {"auroc": float(held.where(seen >= 0.5, 1 - held).mean())}
    if varied:
        held_V = torch.cat([varied[site].held_E for site in sites])
        figures["sensitivity_share"] = float(held_V[index].sum() / held_V.sum().clamp_min(1e-30))
        scores, without = [], []
        for site in sites:
            gone = units.index[index[units.layer[index] == site.layer]].long()
            scores += [eigenscore(e_KE) for e_KE in varied[site].states]
            without += [eigenscore(e_KE.index_fill(1, gone, 0.0)) for e_KE in varied[site].states]
        if scores:
            figures["eigenscore"], figures["eigenscore_without"] = (sum(s) / len(s) for s in (scores, without))
    return {name: round(value, 4) for name, value in figures.items()}
