"""Plan of `adapter_mix`: a task vector as low-rank updates of single linear maps, one pair of factors for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steering.plan.base import MAX_RANK, Plan
from steering.types import Tap

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""A block's linear maps: of the attention q, k, v and o (its last), of the MLP gate, up and down (its last)."""
TARGETS: tuple[Target, ...] = get_args(Target)
SITES: Mapping[Target, tuple[Tap, Tap]] = {
    "q": ("attn_in", "q_out"),
    "k": ("attn_in", "k_out"),
    "v": ("attn_in", "v_out"),
    "o": ("attn_act", "attn_out"),
    "gate": ("mlp_in", "gate_out"),
    "up": ("mlp_in", "up_out"),
    "down": ("mlp_act", "mlp_out"),
}
"""The input and the output of each linear map, as sites."""
MODULE = re.compile(rf"layers\.(0|[1-9]\d{{0,3}})\.({'|'.join(TARGETS)})")
"""How a plan names a linear map: layers.3.q."""
WIDEST = 2**20
"""Beyond the width of any linear map."""


class Factors(NamedTuple):
    """The update B A of one linear map: A (r, in), and Bᵀ (r, out) with the adapter's scale in it."""

    layer: int
    target: Target
    A_RD: Tensor
    B_RE: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterPlan(Plan):
    """Low-rank updates of n linear maps.

    modules (n,) such as layers.3.q, block by block · ranks r, inner, outer (n,) the shapes · a, b: all A (r, in) and
    all Bᵀ (r, out) of the maps one after another, flat, for they have many widths.
    """

    kind: ClassVar[str] = "adapter"

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    a: Tensor
    b: Tensor

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that it updates, ascending."""
        return tuple(sorted({layer for layer, _ in map(place, self.modules)}))

    def factors(self) -> Iterator[Factors]:
        """The updates, in the order of `modules`."""
        a_parts = self.a.split([r * width for r, width in zip(self.ranks, self.inner, strict=True)])
        b_parts = self.b.split([r * width for r, width in zip(self.ranks, self.outer, strict=True)])
        for name, r, a, b in zip(self.modules, self.ranks, a_parts, b_parts, strict=True):
            yield Factors(*place(name), a.view(r, -1), b.view(r, -1))

    def _is_whole(self) -> bool:
        n = len(self.modules)
        sizes = zip(self.ranks, self.inner, self.outer, strict=True)
        if not all(type(size) is int and 0 < size <= WIDEST for row in sizes for size in row):
            return False
        places = [place(name) for name in self.modules]
        return (
            0 < n == len(self.ranks)
            and self.are_layers(self.layers)
            and places == sorted(set(places), key=lambda found: (found[0], TARGETS.index(found[1])))
            and max(self.ranks) <= MAX_RANK
            and self.a.shape == (sum(r * width for r, width in zip(self.ranks, self.inner, strict=True)),)
            and self.b.shape == (sum(r * width for r, width in zip(self.ranks, self.outer, strict=True)),)
            and all(self._fits(*found) for found in zip(places, self.inner, self.outer, strict=True))
            and bool(torch.isfinite(self.a).all() and torch.isfinite(self.b).all())
        )

    def _fits(self, found: tuple[int, Target], inner: int, outer: int) -> bool:
        """Whether the side that is the residual stream's has its width."""
        return (outer if found[1] in ("o", "down") else inner) == self.width


def place(name: str) -> tuple[int, Target]:
    """Block and linear map of layers.3.q. Raises ValueError."""
    match = MODULE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no linear map of a block")
    return int(match[1]), TARGETS[TARGETS.index(match[2])]
