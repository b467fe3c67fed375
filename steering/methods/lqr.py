"""A-LQR setpoint control: hold a concept at β with the gain of a linear-quadratic regulator over the model's layers.

    u_l = a (β_l − v_l·x_l) w_l,        w_l = K_l v_l                          x_{l+1} = f_l(x_l) + u_l

Error at the block's input, control at its output. K_l solves the time-varying Riccati recursion on the layer Jacobians
(`steering.control.riccati`); since the error is a multiple of v_l, two dot products a layer are exact and no n×n matrix
is needed at run time.
Shapes: v, w (L, D), β (L,).   Cost: 2·2·D multiply-adds per token and layer.
Source: A-LQR, arXiv:2604.19018 (feature setpoint, rank-1 form).   Oracle: K_l formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.law import Law
from steering.methods.base import ConceptIntervention, checked_number, targets
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Gains, Units, across


@register
@dataclass(frozen=True, kw_only=True)
class Lqr(ConceptIntervention):
    """Hold a concept at a setpoint by A-LQR feedback."""

    type: Literal["lqr"] = "lqr"
    setpoint: float
    """λ, where the feature is held, in `units`."""
    units: Units = "centred"
    """`centred`: 0 is the mean of the negative examples, 1 of the positive; `contrast`: β = λ‖E‖; `absolute`: β = λ."""
    gains: Gains | None = None
    """Which fitted gain to use; null means the concept's own choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("setpoint", self.setpoint)

    def compile(self, bench: Bench) -> Term:
        """One rank-1 law a layer, from the block's input to its output."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        beta = targets(concept, self.units, self.setpoint)
        gain_LD = concept.gain(self.gains)
        concept.require_gain(layers, gain_LD)
        laws = {
            across(layer): Law.of(
                concept.direction[layer], beta[layer], gain_LD[layer], strength=self.strength, cap=self.cap
            )
            for layer in layers
        }
        return self.term("lqr", concept, laws, layers, target=self.setpoint, units=self.units)
