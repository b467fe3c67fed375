"""From paired examples to a language plan: which autoencoder features make the target language, and how they differ.

I    an autoencoder a block (`steering.fit.sae`); of the `candidates` most selective features those are kept that also
     make the target's words likelier: LiftSlope_j = median_α mean_prompts (ΔM(x + α s d_j) − ΔM(x)) / α > 0 at the last
     token, with ΔM = Σ p(V_tgt) − Σ p(V_src) of the next token, V the words that stand (almost) only in one class
II   ΔZ: rows z̄_i(target) − z̄_i(source) of paired examples on the kept features, z̄ the mean over an example's tokens;
     rank, mass and bootstrap stability of its leading subspace (`steering.control.geometry`); the window is the run of
     3 to 6 neighbouring blocks where Σ mass · stability is largest
III  t = unit(P unit(mean Δz)), s = unit(P mean z̄(source)), m = ‖P mean Δz‖

Positive examples are the target language's, negative ones the source's; row i of one is the other of row i. The effect
of α s d_j is the model's own answer, not a linearisation: the last token runs through the blocks behind, what comes
before it stands still (`steering.plant.jacobian`). The prompts are source examples cut in the middle of what was read.

Quality: of every autoencoder the figures of `steering.fit.sae`; the numbers of words, of kept features and the stages'
figures by block; `overlap` t·s; the AUROC of z·t on held-out examples; and by how much the whole window moves ΔM on
held-out source prompts at λ = 1, 2, 4 and 8, beside the control of random features that writes as much (`random`):
lifts are measured, and features chosen, on prompts of the other examples. All kept
features are the target's and no activation is below zero, so in a subspace of one direction s is t itself.
Source: Neural FOXP2, arXiv:2602.00945, stages I–III.   Oracles: `steering.control.geometry`'s; the lift of one feature
by a hooked forward pass of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from steering.artifact import checked_name
from steering.control.geometry import Subspace, best_window, leading
from steering.errors import SpecError
from steering.fit.concept import Progress, auroc, encode_class, held_out, part_of, provenance
from steering.fit.examples import Example, checked_classes
from steering.fit.lift import LAMBDAS, Encoded, Vocabulary, lift_slopes, moved, prompts_of, vocabulary
from steering.fit.sae import States, Trained, TrainingSettings, per_block, quality_of, trained
from steering.plan import LanguagePlan
from steering.plan.base import MAX_RANK
from steering.plant.capture import Pause
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant

RANK = 12
"""Most directions of a block's subspace, as published."""


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(TrainingSettings):
    """How the features of a language are found. Raises SpecError for impossible values."""

    candidates: int = 50
    """Features of each block whose effect on the words is measured, the most selective first."""
    prompts: int = 8
    """Source examples on which it is measured."""
    context: int = 64
    """Their last tokens that are kept."""
    dominance: float = 0.9
    """Share of a word's frequency that one class must have for the word to count as its language's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("candidates", MAX_RANK - 1), ("prompts", 256), ("context", 4096)):
            value = getattr(self, name)
            least = 2 if name == "context" else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise SpecError(name, expected=f"a whole number in {least}..{most}", got=value)
        if not 0.5 < self.dominance <= 1:
            raise SpecError("dominance", expected="a number in (0.5, 1]", got=self.dominance)
        if self.tap not in ("resid_pre", "resid_post"):
            raise SpecError("tap", expected="resid_pre or resid_post, where a language is moved", got=self.tap)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """The middle half: a quarter to three quarters of the depth."""
        return tuple(range(depth // 4, max(depth // 4 + 1, (3 * depth) // 4)))


@dataclass(frozen=True, eq=False)
class Block:
    """Stages I to III at one block: kept features, their lifts, the subspace, t, s and m."""

    layer: int
    part: Trained
    kept: Tensor
    lift: Tensor
    space: Subspace
    target: Tensor
    source: Tensor
    shift: float
    auroc: float


def fit_language(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example],
    settings: LanguageSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> LanguagePlan:
    """Fit one plan. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, classes that are not paired, languages without words of their own, no
    feature that is kept) and PlantError (a chat for a model without a template).
    """
    settings = settings or LanguageSettings()
    checked_name(name)
    settings.for_model(plant)
    layers = settings.chosen(plant.depth)
    classes = checked_classes(positive, negative)
    if len(classes["positive"]) != len(classes["negative"]):
        expected = f"{len(classes['positive'])} examples, one for each positive one, whose other language it is"
        raise SpecError("negative", expected=expected, got=len(classes["negative"]))
    encoded = {side: encode_class(plant, side, rows, settings.reading(), pause) for side, rows in classes.items()}
    words = vocabulary(encoded["positive"], encoded["negative"], plant.vocab, settings.dominance)
    context = min(settings.context, plant.context)
    held = held_out(len(encoded["negative"])).tolist()

    def along(rows: list[Encoded], start: float) -> Linearisation:
        report = part_of(progress, "prompts", start, start + 0.05)
        prompts = prompts_of(rows, settings.prompts)
        return Linearisation(plant, prompts, max_context=context, progress=report, pause=pause)

    linear = along([row for row, out in zip(encoded["negative"], held, strict=True) if not out], 0.0)

    blocks: list[Block] = []
    parts: list[Trained] = []
    shifted = (lambda stage, done: progress(stage, 0.05 + done)) if progress else None
    for layer, states, inner in per_block(plant, classes, settings, layers, shifted, pause, end=0.85):
        parts.append(trained(plant, states, settings, pause, inner))
        block = _block(plant, linear, words, layer, parts[-1], states, settings, pause)
        if block is not None:
            blocks.append(block)
    if not blocks:
        raise SpecError(
            "positive",
            expected="examples in which some feature makes the target's words likelier",
            advice="give more examples, other layers, or train longer",
        )
    known = tuple(block.layer for block in blocks)
    window = best_window([block.space.mass * block.space.stability for block in blocks], known)
    plan = _plan(plant, name, [block for block in blocks if block.layer in window], settings)
    # On prompts that the features were not chosen on: there even chance ones would raise the words.
    unseen = [row for row, out in zip(encoded["negative"], held, strict=True) if out]
    linear = along(unseen, 0.92) if unseen else linear
    effect = {}
    for which in ("chosen", "random"):
        effect[which] = moved(plant, linear, words, plan, control=which == "random")
        if pause is not None:
            pause()
    if progress:
        progress("done", 1.0)
    quality = _quality(blocks, parts, layers, window, words, effect)
    fields: dict[str, Any] = {
        "quality": quality,
        "provenance": provenance(asdict(settings) | {"layers": list(layers)}, classes),
    }
    return replace(plan, **fields)


def _block(
    plant: Plant,
    linear: Linearisation,
    words: Vocabulary,
    layer: int,
    part: Trained,
    states: dict[str, States],
    settings: LanguageSettings,
    pause: Pause | None,
) -> Block | None:
    """Stages I to III at one block; None where no feature is kept, or the pairs do not differ on those that are."""
    order = part.selectivity.argsort(descending=True, stable=True)[: settings.candidates]
    order = order[part.selectivity[order] > 0]
    if not len(order):
        return None
    first = layer + (settings.tap == "resid_post")
    slope = lift_slopes(plant, linear, words, first, part.ae.writes(order), pause)
    kept, lift = order[slope > 0], slope[slope > 0]
    if not len(kept):
        return None
    z = {side: known.means(part.ae, pause)[:, kept] for side, known in states.items()}
    fitted = ~states["positive"].held_E
    delta_NK = (z["positive"] - z["negative"])[fitted]
    if not bool(delta_NK.any()):
        return None
    space = leading(delta_NK, most=RANK, seed=settings.seed)
    project = space.basis.mT @ space.basis
    difference_K = project @ delta_NK.mean(0)
    shift = float(difference_K.norm())
    if shift == 0:
        return None
    t_K = difference_K / shift
    s_K = normalize(project @ z["negative"][fitted].mean(0), dim=0)
    measured = ~fitted if bool((~fitted).any()) else fitted
    score = {side: z[side][measured] @ t_K for side in z}
    return Block(layer, part, kept, lift, space, t_K, s_K, shift, auroc(score["positive"], score["negative"]))


def _plan(plant: Plant, name: str, blocks: list[Block], settings: LanguageSettings) -> LanguagePlan:
    """The plan of the window's blocks, without its figures."""
    most = max(len(block.kept) for block in blocks)

    def stacked(of: Callable[[Block], Tensor]) -> Tensor:
        rows = [of(block).float() for block in blocks]
        return torch.stack([pad(row, [0, 0] * (row.ndim - 1) + [0, most - len(row)]) for row in rows])

    control = {block.layer: _control(block) for block in blocks}
    return LanguagePlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance={},
        tap=settings.tap,
        layers=tuple(block.layer for block in blocks),
        counts=tuple(len(block.kept) for block in blocks),
        number=stacked(lambda b: b.kept),
        probe=stacked(lambda b: b.part.ae.probes(b.kept)[0]),
        bias=stacked(lambda b: b.part.ae.probes(b.kept)[1]),
        knee=stacked(lambda b: b.part.ae.probes(b.kept)[2]),
        write=stacked(lambda b: b.part.ae.writes(b.kept)),
        target=stacked(lambda b: b.target),
        source=stacked(lambda b: b.source),
        shift=torch.tensor([block.shift for block in blocks]),
        control_probe=stacked(lambda b: b.part.ae.probes(control[b.layer][0])[0]),
        control_bias=stacked(lambda b: b.part.ae.probes(control[b.layer][0])[1]),
        control_knee=stacked(lambda b: b.part.ae.probes(control[b.layer][0])[2]),
        control_write=stacked(lambda b: control[b.layer][1] * b.part.ae.writes(control[b.layer][0])),
    )


def _control(block: Block) -> tuple[Tensor, float]:
    """As many random features as are kept, others where there are enough, and the factor at which they write as much
    towards the target as the kept ones do."""
    ae, pool = block.part.ae, block.part.control.long()
    others = pool[~torch.isin(pool, block.kept)]
    chosen = (others if len(others) >= len(block.kept) else pool)[: len(block.kept)]
    t_K = block.target.float()
    size, own = (float((t_K @ ae.writes(features)).norm()) for features in (chosen, block.kept))
    return chosen, own / size if size > 0 else 1.0


def _quality(
    blocks: list[Block],
    parts: list[Trained],
    layers: tuple[int, ...],
    window: tuple[int, ...],
    words: Vocabulary,
    effect: dict[str, list[float]],
) -> dict[str, Any]:
    """All figures, by block of `blocks` where they are lists, and a warning where the doubt is grave."""
    trained_ = quality_of(parts)
    quality = {
        "autoencoders": {"layers": list(layers), **{k: v for k, v in trained_.items() if k != "warning"}},
        "words": {"target": len(words.target), "source": len(words.source)},
        "layers": [block.layer for block in blocks],
        "kept": [len(block.kept) for block in blocks],
        "lift": [round(float(block.lift.max()), 6) for block in blocks],
        "rank": [len(block.space.basis) for block in blocks],
        "entropy_rank": [round(block.space.entropy_rank, 3) for block in blocks],
        "eigengap": [block.space.eigengap for block in blocks],
        "mass": [round(block.space.mass, 4) for block in blocks],
        "stability": [round(block.space.stability, 4) for block in blocks],
        "overlap": [round(float(block.target @ block.source), 4) for block in blocks],
        "auroc": [round(block.auroc, 4) for block in blocks],
        "shift": [round(block.shift, 4) for block in blocks],
        "window": list(window),
        "strengths": list(LAMBDAS),
        "words_moved": [round(gain, 4) for gain in effect["chosen"]],
        "random": {"words_moved": [round(gain, 4) for gain in effect["random"]]},
        "measured_on": trained_["measured_on"],
    }
    best, by_chance = max(effect["chosen"]), max(effect["random"])
    if best <= by_chance:
        quality["warning"] = (
            f"The plan moves the next word towards the target language no more than random features do ({best:.3f} "
            f"against {by_chance:.3f}): give more examples, or train longer."
        )
    elif "warning" in trained_:
        quality["warning"] = trained_["warning"]
    return quality
