"""Angular steering: turn the state in a plane through a concept's direction to an angle, its norm as it was.

    x' = x − P x + ‖P x‖ (cos φ' b1 + sin φ' b2),    φ' = φ + a·wrap(θ − φ),    φ = atan2(b2·x, b1·x)

b1 is the concept's unit direction at the site, θ = 0 along it, 180° against it. b2 is the first principal component of
the concept's unit directions of all layers, centred, made orthogonal to b1: what varies most along the depth. It is
turned towards later layers, for the sign of a principal component is arbitrary, and 90° and 270° differ by it. The
strength a is the share of the way, along the shorter arc; the norm stays for every a. `adaptive` turns only tokens that
point along b1.

Site: the residual at a block's input or output, where concepts are fitted. The published code fits there too, at the
inputs of the norm modules, and turns their outputs. With RMSNorm the output is γ ⊙ x/rms(x), and a turn leaves rms(x)
as it was: γ ⊙ x'/rms(x') is γ ⊙ (the turned x/rms(x)), so the block reads the turn that was meant, where the unmapped
plane behind γ is another one, and no rotation of what was fitted. (LayerNorm alike: directions fitted there have no
mean.) The difference that is left: here later blocks keep it too, which at a = 1 finds them at the angle already.
Shapes: P (L, 2, D).   Cost: 2·2·D multiply-adds per token and layer. The receipt tells φ before the turn, in radians.
Source: Angular Steering, arXiv:2510.26243, also for the adaptive form. There the components are those of differences of
unit means and one layer's b1 serves all layers (`direction_layer`).   Oracle: the formula in float64; ‖x'‖ = ‖x‖.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steering.concept import Concept
from steering.edit import Turn
from steering.errors import SpecError
from steering.methods.base import ConceptIntervention, checked_number
from steering.program import Term
from steering.registry import Bench, register
from steering.types import edit_at

LEAST = 1e-3
"""Length, of a unit vector, below which what is left beside b1 is rounding of float32 directions."""


@register
@dataclass(frozen=True, kw_only=True)
class Angular(ConceptIntervention):
    """Turn the state in a plane through a concept's direction, keeping its norm."""

    type: Literal["angular"] = "angular"
    angle: float = 0.0
    """θ in degrees, 0 to 360: 0 along the concept, 180 against it."""
    adaptive: bool = False
    """Turn only tokens whose state points along the concept."""
    site: Literal["resid_pre", "resid_post"] = "resid_pre"
    """Turn the block's input, or its output."""
    direction_layer: int | None = None
    """b1 of this layer everywhere, as published; null means each layer's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("angle", self.angle, least=0.0, most=360.0)
        if self.site not in ("resid_pre", "resid_post"):
            raise SpecError("site", expected="resid_pre or resid_post", got=self.site)

    def compile(self, bench: Bench) -> Term:
        """One turn at each chosen block."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        source = self.direction_layer
        if source is not None and not (0 <= source <= concept.depth and concept.direction[source].any()):
            raise SpecError(
                "direction_layer", expected=f"a layer where concept {self.concept!r} has a direction", got=source
            )
        second_D = second_direction(concept)
        behind = self.site == "resid_post"
        turns = {}
        for layer in layers:
            first_D = concept.direction[layer + behind if source is None else source]
            if first_D.any():
                turns[edit_at("turn", self.site, layer)] = Turn.of(
                    plane(first_D, second_D, concept.name),
                    math.radians(self.angle),
                    adaptive=self.adaptive,
                    strength=self.strength,
                    cap=self.cap,
                )
        if not turns:
            raise SpecError(
                "layers", expected=f"layers where concept {self.concept!r} has a direction", got=list(layers)
            )
        # No target: the mean of angles that lie on both sides of ±180 says nothing of how near they are to one.
        gauges = dict.fromkeys(turns, (0.0, math.radians(1)))
        return Term(self.concept, "angular", turns, self.apply, "degrees", None, gauges)


def second_direction(concept: Concept) -> Tensor:
    """b2 (D,), float64: the first principal component of the unit directions, centred, towards later layers.

    Raises SpecError where they do not differ.
    """
    has_L = concept.direction.any(dim=-1)
    v_LD = concept.direction[has_L].double()
    centred_LD = v_LD - v_LD.mean(0)
    _, size_K, b_KD = torch.linalg.svd(centred_LD, full_matrices=False)
    if not len(size_K) or float(size_K[0]) < LEAST:
        raise SpecError("concept", expected="a concept whose directions differ between layers", got=concept.name)
    depth_L = torch.arange(len(v_LD), dtype=torch.float64)
    along = float((depth_L - depth_L.mean()) @ (centred_LD @ b_KD[0]))
    return -b_KD[0] if along < 0 else b_KD[0]


def plane(first_D: Tensor, second_D: Tensor, name: str) -> Tensor:
    """Orthonormal rows b1, b2 (2, D), of the number format of b1. Raises SpecError where b2 lies along b1."""
    b1_D = first_D.double() / first_D.double().norm()
    rest_D = second_D - (second_D @ b1_D) * b1_D
    if float(rest_D.norm()) < LEAST:
        raise SpecError(
            "concept",
            expected="a concept whose directions vary across the direction itself",
            got=name,
            advice="their first principal component lies along it: choose another direction_layer, or other layers",
        )
    return torch.stack([b1_D, rest_D / rest_D.norm()]).to(first_D.dtype)
