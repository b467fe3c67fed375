"""Directional ablation: remove a concept's direction from the residual stream.

    x' = x − a v vᵀ x            v unit, a ∈ [0, 1]

At a = 1 the map is the projector I − vvᵀ: idempotent, and vᵀx' = 0. Applied at every chosen block input, with that
layer's own direction, or with the direction of one layer everywhere (`direction_layer`), which is the published form.
Shapes: v (L, D).   Cost: 2·2·D multiply-adds per token and layer.
Source: Arditi et al. 2024, arXiv:2406.11717, Sec. 2.4 (directional ablation).   Oracle: I − vvᵀ formed explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.errors import SpecError
from steering.law import Law
from steering.methods.base import ConceptIntervention, checked_number, meter
from steering.program import Term
from steering.registry import Bench, register
from steering.types import across, at


@register
@dataclass(frozen=True, kw_only=True)
class Ablate(ConceptIntervention):
    """Remove a concept's direction from the residual stream."""

    type: Literal["ablate"] = "ablate"
    direction_layer: int | None = None
    """Use the direction of this layer everywhere, as published; null means each layer's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number("strength", self.strength, least=0.0, most=1.0)

    def compile(self, bench: Bench) -> Term:
        """A projector at each block input, and a meter behind it that reports what is left."""
        concept = bench.concept(self.concept)
        layers = self.chosen_layers(concept)
        source = self.direction_layer
        if source is not None and not 0 <= source <= concept.depth:
            raise SpecError("direction_layer", expected=f"a layer in 0..{concept.depth}", got=source)
        if source is not None and not concept.direction[source].any():
            raise SpecError(
                "direction_layer", expected=f"a layer where concept {self.concept!r} has a direction", got=source
            )
        laws = {}
        for layer in layers:
            v = concept.direction[layer if source is None else source]
            laws[at("resid_pre", layer)] = Law.of(v, 0.0, v, strength=self.strength, cap=self.cap)
            laws[across(layer)] = meter(concept.direction[layer], strength=self.strength)
        return self.term("ablate", concept, laws, layers)
