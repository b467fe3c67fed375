"""Massive activations: the few coordinates of a few tokens that are a thousand times as large as all others.

    massive(t, i)   where   |h_ti| > 100   and   |h_ti| > 1000 · median |h|          over one text's state h (T, D)

They stand at position 0 and at the first delimiters, in one to six coordinates that are the same for every text, from
an early block to the last but one. They are constants that attention leans on: put to zero, the perplexity of
Llama-2-7B goes from 5 to 9,000. So no write may touch them (`steering.methods.guards`), and no statistic may hold them.
`Plant.massive` looks for them once, when a model is loaded.
Cost: one forward pass of four texts, some 200 tokens in all, and one reduction over each of the L + 1 states.
Source: Sun et al. 2024, arXiv:2402.17762, Sec. 2.   Oracle: the loop over tokens and coordinates; a model whose weights
make one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steering.errors import PlantError
from steering.types import Site

if TYPE_CHECKING:
    from steering.plant.plant import Plant

MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
RESIDUAL = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""Taps whose coordinates are those of the residual stream."""
TEXTS = (
    "The river runs from the hills to the sea. In summer it is low, and children cross it on stones.",
    "Summer is warm. Winter is cold.\nSpring and autumn are in between; most people like one of them best.",
    "She asked: what is the time? It was half past nine, he said, and the train had gone.\n\nThey walked home.",
    "First, wash the rice. Second, boil two cups of water. Third, add salt, rice and a little oil, and wait.",
)
"""Texts in which they are looked for: sentences with the delimiters that carry them."""


def are_massive(h_TD: Tensor) -> Tensor:
    """Boolean (T, D): which activations of one text's state are massive."""
    size_TD = h_TD.abs()
    return size_TD > max(MASSIVE, MASSIVE_RATIO * float(size_TD.median()))


@dataclass(frozen=True)
class Massive:
    """What was found in one model.

    dims: massive coordinates of the states x_0 … x_L, ascending · first: whether position 0 has them · tokens: ids of
    the tokens that had them elsewhere, ascending · peak: the largest |h| among them, 0 where there is none.
    """

    dims: tuple[tuple[int, ...], ...] = ()
    first: bool = False
    tokens: tuple[int, ...] = ()
    peak: float = 0.0


@dataclass(frozen=True)
class Caution:
    """What every write into the residual stream of one model leaves alone; nothing by default.

    dims, first: as of `Massive`. mean_free: whether the mean over coordinates is invisible to every reader, as it is
    behind LayerNorm, so that a push along it is only spent.
    """

    dims: tuple[tuple[int, ...], ...] = ()
    first: bool = False
    mean_free: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to leave alone."""
        return self.first or self.mean_free or any(self.dims)

    def at(self, site: Site) -> tuple[int, ...]:
        """The massive coordinates at a site: of its state, or of those before and behind the block that it writes in,
        since one block makes them and another takes them away."""
        if site.tap not in RESIDUAL or not self.dims:
            return ()
        before, behind = self.dims[site.layer], self.dims[site.layer + 1]
        if site.tap == "resid_pre":
            return before
        return behind if site.tap == "resid_post" else tuple(sorted({*before, *behind}))


def find_massive(plant: Plant) -> Massive:
    """Look for them in `TEXTS`; in random tokens where the model has no tokenizer."""
    from steering.plant.capture import capture_each, state_sites

    prompts = _prompts(plant)
    sites = state_sites(plant)
    dims: Mapping[Site, set[int]] = {site: set() for site in sites}
    positions: set[tuple[int, int]] = set()
    peak = 0.0

    def keep(site: Site, n: int, h_TD: Tensor) -> None:
        nonlocal peak
        h_TD = h_TD.float().cpu()
        is_massive_TD = are_massive(h_TD)
        if bool(is_massive_TD.any()):
            peak = max(peak, float(h_TD[is_massive_TD].abs().max()))
            dims[site].update(is_massive_TD.any(0).nonzero().flatten().tolist())
            positions.update((n, t) for t in is_massive_TD.any(1).nonzero().flatten().tolist())

    capture_each(plant, prompts, sites, keep, [range(len(ids)) for ids in prompts])
    return Massive(
        tuple(tuple(sorted(dims[site])) for site in sites),
        any(t == 0 for _, t in positions),
        tuple(sorted({prompts[n][t] for n, t in positions if t > 0})),
        peak,
    )


def _prompts(plant: Plant) -> list[list[int]]:
    """Token ids of the texts, no longer than the context."""
    try:
        return [plant.encode(text)[: plant.context] for text in TEXTS]
    except PlantError:
        generator = torch.Generator().manual_seed(0)
        shape = (len(TEXTS), min(64, plant.context))
        return [list(row) for row in torch.randint(plant.vocab, shape, generator=generator).tolist()]
