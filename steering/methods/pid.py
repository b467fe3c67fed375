"""S-PID: proportional, integral and derivative feedback over the layers, without a model of them.

    e_l = (β_l − v_l·x_l) v_l
    u_l = K_p e_l + K_i Σ_{s ∈ window(l)} e_s + K_d (e_l − e_{l−1})            added to the block's output

The sum is emptied after every `reset_every` blocks: at block indices that are multiples of it there is no integral
term, and later blocks sum from the next one on. The first controlled block has no derivative term of an earlier error
(e_{l−1} = 0). The integral and derivative terms are laws that read earlier block inputs, so one token's control depends
on that token alone; the published code keeps the sum and the last error across tokens and batch rows, which is a leak,
not a term.
Shapes: v (L, D), β (L,).   Cost: one rank-1 law for every pair of blocks in a window.
`max_effort` is shared out over the routes that write a block, each part relative to the state that it reads.
Source: arXiv:2604.19018, S-PID baseline.   Oracle: the sums formed layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import ConceptIntervention, checked_number, targets
from steering.program import Term
from steering.registry import Bench, register
from steering.types import Route, Site, Units


@register
@dataclass(frozen=True, kw_only=True)
class Pid(ConceptIntervention):
    """Hold a concept at a setpoint by PID feedback over the layers."""

    type: Literal["pid"] = "pid"
    setpoint: float
    """λ, where the feature is held, in `units`."""
    units: Units = "centred"
    """`centred`, `contrast` or `absolute`, as for `lqr`."""
    kp: float = 0.7
    """Proportional gain."""
    ki: float = 0.01
    """Integral gain over the layers of a window."""
    kd: float = 0.1
    """Derivative gain between neighbouring layers."""
    reset_every: int = 10
    """Length of the integral's window, in blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("setpoint", "kp", "ki", "kd"):
            checked_number(name, getattr(self, name))
        checked_number("kp", abs(self.kp) + abs(self.ki) + abs(self.kd))
        checked_number("reset_every", self.reset_every, least=1)
        if self.kp == self.ki == self.kd == 0:
            raise SpecError("kp", expected="kp, ki or kd other than 0", got=self.kp)

    def compile(self, bench: Bench) -> Term:
        """A rank-1 law from each block input of the window to each block output behind it."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        beta = targets(concept, self.units, self.setpoint)
        laws = {}
        for position, write in enumerate(layers):
            reads = self._coefficients(layers[: position + 1])
            for read, coefficient in reads.items():
                v = concept.direction[read]
                route = Route(Site("resid_pre", read), Site("resid_post", write))
                laws[route] = Law.of(v, beta[read], coefficient * v, strength=self.strength, cap=self.cap / len(reads))
        return self.term("pid", concept, laws, layers, target=self.setpoint, units=self.units)

    def _coefficients(self, layers: tuple[int, ...]) -> dict[int, float]:
        """Weight of the error of each layer read, in the control of the last of `layers`."""
        here = layers[-1]
        weights = {here: self.kp + self.kd}
        if len(layers) > 1 and self.kd:
            weights[layers[-2]] = -self.kd
        if self.ki and here % self.reset_every:
            start = here - here % self.reset_every
            for read in layers:
                if read > start:
                    weights[read] = weights.get(read, 0.0) + self.ki
        return dict(sorted(weights.items()))
