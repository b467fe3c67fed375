"""Clamp: set the projection on a concept to β at every block input, whatever the model computed there.

    x' = x + a (β_l − v_l·x) v_l                at a = 1:  v_l·x' = β_l exactly

The model-free limit of setpoint control: exact tracking, no account of what the next block does with it.
Shapes: v (L, D), β (L,).   Cost: 2·2·D multiply-adds per token and layer.
Source: the least-norm edit that reaches β, arXiv:2604.19018, Theorem 4.1.   Oracle: v·x' = β.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.law import Law
from steering.methods.base import ConceptIntervention, checked_number, meter, targets
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Units, across, at


@register
@dataclass(frozen=True, kw_only=True)
class Clamp(ConceptIntervention):
    """Set the projection on a concept to a value at every block input."""

    type: Literal["clamp"] = "clamp"
    setpoint: float
    """λ, the value to set, in `units`."""
    units: Units = "centred"
    """`centred`, `contrast` or `absolute`, as for `lqr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("setpoint", self.setpoint)

    def compile(self, bench: Bench) -> Term:
        """One rank-1 law at each block input, and a meter behind it that reports what the block then received."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        beta = targets(concept, self.units, self.setpoint)
        laws = {}
        for layer in layers:
            v = concept.direction[layer]
            laws[at("resid_pre", layer)] = Law.of(v, beta[layer], v, strength=self.strength, cap=self.cap)
            laws[across(layer)] = meter(v, beta[layer], strength=self.strength)
        return self.term("clamp", concept, laws, layers, target=self.setpoint, units=self.units)
