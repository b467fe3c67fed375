"""Figures of a set of generated texts.

perplexity   exp(mean negative log-likelihood of the generated tokens under the unsteered model, given their prompts);
             the mean runs over all tokens of the set, so that empty and short answers weigh what they are
distinct-n   distinct word n-grams over all word n-grams of the set (Li et al. 2016, arXiv:1510.03055)
interval     Wilson score interval of a rate, 95% (Wilson 1927), over answers: those of one prompt under several seeds
                 are not quite independent, so it is a little narrow
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from steering.plant.plant import Plant

Z_95 = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""


def perplexity(
    plant: Plant,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int = 32,
    pause: Callable[[], None] | None = None,
) -> float:
    """Perplexity of continuations under the plain model. pairs: (prompt ids, generated ids); NaN when all are empty.

    `pause` is called after every batch; what it raises ends the work.
    """
    shell = plant.shell("sdpa")
    rows = sorted((pair for pair in pairs if pair[1]), key=lambda pair: len(pair[0]) + len(pair[1]))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        ids_BT = torch.zeros(len(part), longest, dtype=torch.long, device=plant.device)
        labels_BT = torch.full_like(ids_BT, -100)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (prompt, answer) in enumerate(part):
            end = len(prompt) + len(answer)
            ids_BT[row, :end] = torch.tensor([*prompt, *answer], device=plant.device)
            labels_BT[row, len(prompt) : end] = ids_BT[row, len(prompt) : end]
            mask_BT[row, :end] = 1
        with torch.no_grad():
            logits_BTV = shell(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        total += float(loss)
        count += int((labels_BT[:, 1:] != -100).sum())
        if pause is not None:
            pause()
    return math.exp(total / count) if count else math.nan


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all of them; NaN when there is none."""
    grams = [tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a rate; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = (rate + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 / (1 + Z_95**2 / trials) * math.sqrt(rate * (1 - rate) / trials + Z_95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
