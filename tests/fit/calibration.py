"""Calibration texts for the tiny models, and a model whose masked modules are computed by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from steering.fit.trial import Row
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.plant.taps import linear_weight, linears_at
from steering.types import Site
from tests.plants import WORDS

_DRAW = random.Random(7)
TEXTS = [" ".join(_DRAW.choice(WORDS[8:]) for _ in range(_DRAW.randint(6, 20))) for _ in range(14)]
CHAT = [
    {"role": "user", "content": "you see the cat and the dog"},
    {"role": "assistant", "content": "I love the cat and hate the dog"},
]


def rows(plant: Plant, n: int = 5) -> list[Row]:
    """Some of the texts, read from position 1 on."""
    return [Row(plant.encode(text), 1) for text in TEXTS[:n]]


def own_texts(plant: Plant, n: int, length: int = 16) -> list[str]:
    """Texts that a tiny model would write itself, so that whatever disturbs it raises its perplexity."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.ones(n, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(length):
            logits_BV = plant.model(input_ids=ids_BT).logits[:, -1]
            logits_BV[:, :8] = -torch.inf  # special tokens
            drawn_B1 = torch.multinomial((3 * logits_BV).softmax(-1), 1, generator=generator)
            ids_BT = torch.cat([ids_BT, drawn_B1], dim=1)
    return [" ".join(WORDS[i] for i in ids) for ids in ids_BT[:, 1:].tolist()]


class Masked(nn.Module):
    """A linear map that reads `keep(x)` ⊙ x from position `first` on, and adds W Rᵀ R of what is left out."""

    def __init__(self, linear: nn.Module, keep: Callable[[Tensor], Tensor], rest_KE: Tensor, first: int) -> None:
        super().__init__()
        self.weight = linear_weight(linear)
        self.bias: Tensor | None = getattr(linear, "bias", None)
        self.keep, self.rest_KE, self.first = keep, rest_KE, first

    def forward(self, x_BTE: Tensor) -> Tensor:
        m_BTE = self.keep(x_BTE)
        m_BTE[:, : self.first] = 1.0
        y_BTO = (m_BTE * x_BTE) @ self.weight.mT
        y_BTO = y_BTO + (1 - m_BTE) * x_BTE @ self.rest_KE.mT @ (self.weight @ self.rest_KE.mT).mT
        return y_BTO if self.bias is None else y_BTO + self.bias


def loss_by_hand(
    plant: Plant,
    texts: Sequence[Row],
    keeps: Mapping[Site, Callable[..., Tensor]],
    rests: Mapping[Site, Tensor] | None = None,
    *,
    first: int = 1,
) -> float:
    """Nats per token with the linear maps that read these sites replaced, one text at a time."""
    shell = plant.shell()
    blocks = blocks_of(shell, plant.layout)
    for site, keep in keeps.items():
        names = {module: name for name, module in blocks[site.layer].named_modules()}
        for linear in linears_at(shell, plant.layout, site):
            parent, _, child = names[linear].rpartition(".")
            rest_KE = (rests or {}).get(site, torch.zeros(0, linear_weight(linear).shape[1]))
            masked = Masked(linear, keep, rest_KE, first)
            setattr(blocks[site.layer].get_submodule(parent), child, masked)
    total, count = 0.0, 0
    for ids, start in texts:
        with torch.no_grad():
            logits_TV = shell(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(max(start, first + 1), len(ids)):
            total -= float(logits_TV[t - 1, ids[t]])
            count += 1
    return total / count
