"""Activation addition: add a fixed multiple of a vector, open loop.

    x_{l+1} = f_l(x_l) + (a / n) E_{l+1}            a concept's difference of means, for the n chosen layers l
    x_{l+1} = f_l(x_l) + a z_l                      vectors z_l that travel in the request

With one layer it is contrastive activation addition at that block's output; spread over n layers, strength 1 adds about
one contrast in all, so strengths compare with the setpoints of the closed-loop methods. Vectors of the request are
added as they are, `layer.N` at the output of block N, as llama.cpp applies `direction.N` of a control vector.
Shapes: E (L+1, D), z (D,).   Cost: D multiply-adds per token and layer, D more to report the projection.
Source: CAA, arXiv:2312.06681, Sec. 2; ActAdd, arXiv:2308.10248.   Oracle: the sum formed explicitly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import MaybeConcept, checked_layers, meter
from steering.methods.inline import InlineTensor, by_layer
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, across


@register
@dataclass(frozen=True, kw_only=True)
class Add(MaybeConcept):
    """Add a fixed multiple of a vector, open loop: a concept's difference of means, or vectors of the request."""

    type: Literal["add"] = "add"
    inline: Mapping[str, InlineTensor] | None = None
    """Instead of a concept: `layer.N` → a vector (D,) that is added at the output of block N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.concept is None) == (self.inline is None):
            given = "neither" if self.concept is None else "both"
            raise SpecError("concept", expected="either concept or inline", got=given)

    def compile(self, bench: Bench) -> Term:
        """A meter at each block's input and a constant at its output; vectors of the request come without a meter."""
        if self.inline is not None:
            return self._of_vectors(bench)
        concept = bench.concept(str(self.concept))
        layers = self.chosen_layers(concept)
        laws = {}
        for layer in layers:
            share = concept.magnitude[layer + 1] / len(layers) * concept.direction[layer + 1]
            laws[across(layer)] = meter(concept.direction[layer], strength=self.strength) + self._push(share)
        return self.term("add", concept, laws, layers)

    def _of_vectors(self, bench: Bench) -> Term:
        vectors = by_layer("inline", self.inline or {}, bench.depth, bench.width)
        layers = tuple(sorted(vectors)) if self.layers is None else checked_layers(self.layers, bench.depth)
        if missing := [layer for layer in layers if layer not in vectors]:
            raise SpecError("layers", expected=f"layers that inline has, {sorted(vectors)}", got=missing[0])
        laws: dict[Route, Law] = {across(layer): self._push(vectors[layer]) for layer in layers}
        if not any(vectors[layer].any() for layer in layers):
            raise SpecError("inline", expected="a vector that is not zero")
        return Term("inline", "add", laws, self.apply)

    def _push(self, vector: Tensor) -> Law:
        return Law.of(torch.zeros_like(vector), 1.0, vector, strength=self.strength, cap=self.cap)
