"""Which words are a language's, and how much an addition to the last token's state moves their probability.

    V_tgt = {w : f₊(w) / (f₊(w) + f₋(w)) ≥ dominance},  V_src the same of f₋        f: frequencies in the two classes
    ΔM(x) = Σ_{w ∈ V_tgt} p(w) − Σ_{w ∈ V_src} p(w)                                of the next token
    LiftSlope_j = median_{α ∈ {.5, 1, 2, 5, 10, 15}} mean_prompts (ΔM(x + α g_j) − ΔM(x)) / α

Source: Neural FOXP2, arXiv:2602.00945, stage I.   Oracle: a hooked forward pass of the whole prompt.
Cost: 6·J rows of one token through the blocks behind, for each of P prompts and J directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.plan import LanguagePlan
from steering.plant.capture import Pause
from steering.plant.jacobian import Linearisation
from steering.plant.plant import Plant
from steering.plant.taps import site_module
from steering.types import Site

ALPHAS = (0.5, 1.0, 2.0, 5.0, 10.0, 15.0)
LAMBDAS = (1.0, 2.0, 4.0, 8.0)
"""Strengths at which a plan is tried, in distances of the classes' means."""
RARE = 2
"""Words that a class has fewer times tell nothing of its language."""
ROWS = 64
"""States that run through a block at a time."""
Encoded = tuple[list[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Token numbers of the two languages' own words."""

    target: Tensor
    source: Tensor

    def margin(self, probability_KV: Tensor) -> Tensor:
        """ΔM (K,)."""
        return probability_KV[:, self.target].sum(-1) - probability_KV[:, self.source].sum(-1)


def vocabulary(positive: Sequence[Encoded], negative: Sequence[Encoded], vocab: int, dominance: float) -> Vocabulary:
    """The words of each class's own, by their frequencies in whole examples. Raises SpecError where one has none."""
    counts = []
    for rows in (positive, negative):
        ids = torch.tensor([token for ids, _ in rows for token in ids])
        counts.append(torch.bincount(ids, minlength=vocab).double())
    share = [count / count.sum() for count in counts]
    own = [
        torch.nonzero((counts[i] >= RARE) & (share[i] >= dominance * (share[0] + share[1]))).flatten() for i in (0, 1)
    ]
    for side, words in zip(("positive", "negative"), own, strict=True):
        if not len(words):
            expected = f"examples with words that stand (share {dominance:g}) in this class alone"
            raise SpecError(side, expected=expected, advice="lower dominance, or give more examples")
    return Vocabulary(*own)


def prompts_of(rows: Sequence[Encoded], count: int) -> list[list[int]]:
    """Prefixes that end in the middle of what an example's reading covers, evenly spread over the examples.

    The end itself is often an end-of-text token, which nothing follows.
    """
    count = min(count, len(rows))
    picked = [rows[i * len(rows) // count] for i in range(count)]
    return [list(ids[: chosen[len(chosen) // 2] + 1]) for ids, chosen in picked]


def next_words(plant: Plant, x_KD: Tensor) -> Tensor:
    """Probabilities of the next token (K, V) after states x_L (K, D), the output of the last block."""
    norm = site_module(plant.model, plant.layout, Site("final", 0))
    with torch.no_grad():
        logits_KV = plant.model.get_output_embeddings()(norm(x_KD.to(plant.device, plant.dtype))).float()
    cap = getattr(plant.model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        logits_KV = cap * torch.tanh(logits_KV / cap)
    return logits_KV.softmax(-1).cpu()


def lift_slopes(
    plant: Plant, linear: Linearisation, words: Vocabulary, first: int, gain_JD: Tensor, pause: Pause | None = None
) -> Tensor:
    """LiftSlope (J,) of adding multiples of each row of `gain_JD` to x_first, the input of block `first`."""
    alpha_A = torch.tensor(ALPHAS)
    add_KD = (alpha_A[:, None, None] * gain_JD.float().cpu()).flatten(0, 1)
    slope_AJ = torch.zeros(len(ALPHAS), len(gain_JD))
    for prompt, state_LD in enumerate(linear.states_PLD):
        start_D = state_LD[first].float().cpu()
        rows_KD = torch.cat([start_D[None], start_D + add_KD])
        margin_K = _margins(plant, linear, words, prompt, first, rows_KD, pause)
        slope_AJ += (margin_K[1:] - margin_K[0]).view_as(slope_AJ) / alpha_A[:, None]
    ordered = (slope_AJ / len(linear.states_PLD)).sort(0).values
    return ordered[(len(ALPHAS) - 1) // 2 : len(ALPHAS) // 2 + 1].mean(0)


def moved(
    plant: Plant, linear: Linearisation, words: Vocabulary, plan: LanguagePlan, *, control: bool = False
) -> list[float]:
    """By how much the plan's laws raise ΔM at the last token for each of `LAMBDAS`, without suppression; mean over the
    prompts."""
    laws = {
        layer + (plan.tap == "resid_post"): plan.law(row, suppress=0.0, control=control)
        for row, layer in enumerate(plan.layers)
    }
    start = min(laws)
    total_K = torch.zeros(len(LAMBDAS))
    for prompt, state_LD in enumerate(linear.states_PLD):
        x_KD = state_LD[start].float().cpu().expand(len(LAMBDAS) + 1, -1)
        for layer in range(start, plant.depth + 1):
            if layer in laws:
                rows = zip((0.0, *LAMBDAS), x_KD, strict=True)
                x_KD = torch.cat([(lam * laws[layer])(x_D[None], x_D[None]) for lam, x_D in rows])
            if layer < plant.depth:
                x_KD = linear.step(layer, prompt, x_KD)
        margin_K = words.margin(next_words(plant, x_KD))
        total_K += margin_K[1:] - margin_K[0]
    return [float(gain) for gain in total_K / len(linear.states_PLD)]


def _margins(
    plant: Plant,
    linear: Linearisation,
    words: Vocabulary,
    prompt: int,
    first: int,
    x_KD: Tensor,
    pause: Pause | None = None,
) -> Tensor:
    """ΔM (K,) after states x_first of one prompt's last token have run through the blocks behind."""
    found = []
    for x_RD in x_KD.split(ROWS):
        y_RD = x_RD
        for layer in range(first, plant.depth):
            y_RD = linear.step(layer, prompt, y_RD)
        found.append(words.margin(next_words(plant, y_RD)))
        if pause is not None:
            pause()
    return torch.cat(found)
