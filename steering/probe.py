"""Reading without steering: the projections of a prompt's tokens on concepts, at the input of every block.

    z_tl = v_l · x_tl,        λ_tl = (z_tl − origin_l) / scale_l

x_tl is the residual at the input of block l (`resid_pre`), the very quantity that the laws read, so that what is traced
here and what a receipt reports agree.   Oracle: dot products with `output_hidden_states`, whose entry l is x_l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from steering.concept import Concept
from steering.control import setpoints
from steering.errors import PlantError
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site, Units


@dataclass(frozen=True)
class Projections:
    """One concept's projections, [token][layer].

    in_units: λ in the caller's units, None where the concept has no scale at a layer. raw: v·x as it is.
    """

    concept: str
    in_units: list[list[float | None]]
    raw: list[list[float]]


def trace_prompt(
    plant: Plant, concepts: Sequence[Concept], tokens: Sequence[int], units: Units = "centred"
) -> list[Projections]:
    """Projections of every token of a prompt on each concept. One forward pass for all of them.

    Raises PlantError for a prompt that is too long or whose states are not finite, SpecError for unknown units.
    """
    sites = [Site("resid_pre", layer) for layer in range(plant.depth)]
    states = capture(plant, [list(tokens)], sites, "all", skip=0)
    found = []
    for concept in concepts:
        schedule = setpoints(units, concept.origin, concept.magnitude)
        by_layer = [states[site][0] @ concept.direction[layer] for layer, site in enumerate(sites)]
        raw = [[float(z_T[token]) for z_T in by_layer] for token in range(len(tokens))]
        if not all(math.isfinite(value) for row in raw for value in row):
            raise PlantError("The model's states are not finite for this prompt: send another one.", param="prompt")
        origin, scale = schedule.origin_L.tolist(), schedule.scale_L.tolist()
        in_units = [
            [(z - origin[layer]) / scale[layer] if scale[layer] > 0 else None for layer, z in enumerate(row)]
            for row in raw
        ]
        found.append(Projections(concept.name, in_units, raw))
    return found
