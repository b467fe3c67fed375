"""Activation addition: add a fixed multiple of a vector, open loop.

    x_{l+1} = f_l(x_l) + (a / n) E_{l+1}            a concept's difference of means, for the n chosen layers l
    x_{l+1} = f_l(x_l) + a z_l                      vectors z_l that travel in the request
    u_l = (a / n) ‖x_l‖ v_{l+1},   a ‖x_l‖ z_l/‖z_l‖   the same relative to the running norm (`scale: running_norm`)

With one layer it is contrastive activation addition at that block's output; spread over n layers, strength 1 adds about
one contrast in all, so strengths compare with the setpoints of the closed-loop methods. Vectors of the request are
added as they are, `layer.N` at the output of block N, as llama.cpp applies `direction.N` of a control vector.
The residual grows along the layers and differs between tokens, so that a push of fixed length fades with depth (GPT-2's
standard deviation goes from 1.8 to 5.4); relative to the running norm ‖u_l‖/‖x_l‖ is what is asked for: a in all.
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

    scale: Literal["absolute", "running_norm"] = "absolute"
    """`absolute`: the vectors as long as they are. `running_norm`: each of the length of the state at its block's
    input, so that `strength` is their share of it, spread over the layers for a concept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("absolute", "running_norm"):
            raise SpecError("scale", expected="absolute or running_norm", got=self.scale)
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
            length = 1.0 if self.is_relative else concept.magnitude[layer + 1]
            share = length / len(layers) * concept.direction[layer + 1]
            laws[across(layer)] = meter(concept.direction[layer], strength=self.strength) + self._push(share)
        return self.term("add", concept, laws, layers)

    def _of_vectors(self, bench: Bench) -> Term:
        vectors = by_layer("inline", self.inline or {}, bench.depth, bench.width)
        layers = tuple(sorted(vectors)) if self.layers is None else checked_layers(self.layers, bench.depth)
        if missing := [layer for layer in layers if layer not in vectors]:
            raise SpecError("layers", expected=f"layers that inline has, {sorted(vectors)}", got=missing[0])
        if not any(vectors[layer].any() for layer in layers):
            raise SpecError("inline", expected="a vector that is not zero")
        if self.is_relative:
            vectors = {layer: _unit(z_D) for layer, z_D in vectors.items()}
        laws: dict[Route, Law] = {across(layer): self._push(vectors[layer]) for layer in layers}
        return Term("inline", "add", laws, self.apply)

    @property
    def is_relative(self) -> bool:
        """Whether lengths are relative to the running norm."""
        return self.scale == "running_norm"

    def _push(self, vector: Tensor) -> Law:
        probe, relative = torch.zeros_like(vector), self.is_relative
        return Law.of(probe, 1.0, vector, strength=self.strength, cap=self.cap, relative=relative)


def _unit(z_D: Tensor) -> Tensor:
    """z/‖z‖, and 0 for 0; through float64, where the square of a small or large float32 neither vanishes nor ends."""
    return (z_D.double() / z_D.double().norm().clamp_min(1e-300)).to(z_D.dtype)
