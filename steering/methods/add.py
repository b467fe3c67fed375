"""Activation addition: add a fixed multiple of a concept's difference of means, open loop.

    x_{l+1} = f_l(x_l) + (a / n) E_{l+1}            for the n chosen layers l

With one layer it is contrastive activation addition at that block's output; spread over n layers, strength 1 adds about
one contrast in all, so strengths compare with the setpoints of the closed-loop methods.
Shapes: E (L+1, D).   Cost: D multiply-adds per token and layer, D more to report the projection.
Source: CAA, arXiv:2312.06681, Sec. 2; ActAdd, arXiv:2308.10248.   Oracle: the sum formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from steering.law import Law
from steering.methods.base import ConceptIntervention, meter
from steering.program import Term
from steering.registry import Bench, register
from steering.types import across


@register
@dataclass(frozen=True, kw_only=True)
class Add(ConceptIntervention):
    """Add a fixed multiple of a concept's difference of means, open loop."""

    type: Literal["add"] = "add"

    def compile(self, bench: Bench) -> Term:
        """A meter at each block's input and a constant at its output."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        laws = {}
        for layer in layers:
            share = concept.magnitude[layer + 1] / len(layers) * concept.direction[layer + 1]
            push = Law.of(torch.zeros_like(share), 1.0, share, strength=self.strength, cap=self.cap)
            laws[across(layer)] = meter(concept.direction[layer], strength=self.strength) + push
        return self.term("add", concept, laws, layers)
