from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from steering import Concept, Plant, PlantError, SpecError, trace_prompt
from tests.plants import WIDTH, tiny

LAYERS = 3


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"))


def concept(zero: int | None = None) -> Concept:
    """Random unit directions; layer `zero` has no scale."""
    generator = torch.Generator().manual_seed(4)
    direction = torch.nn.functional.normalize(torch.randn(LAYERS + 1, WIDTH, generator=generator), dim=-1)
    magnitude = torch.rand(LAYERS + 1, generator=generator) + 0.5
    if zero is not None:
        magnitude[zero] = 0.0
    origin = torch.randn(LAYERS + 1, generator=generator)
    return cast(Concept, SimpleNamespace(name="c", direction=direction, magnitude=magnitude, origin=origin))


def test_projections_are_the_dot_products_of_the_hidden_states(plant: Plant) -> None:
    tokens, one = [3, 9, 27, 14, 5], concept()
    (found,) = trace_prompt(plant, [one], tokens)
    with torch.no_grad():
        states = plant.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        z_T = states[layer][0] @ one.direction[layer]
        assert [row[layer] for row in found.raw] == pytest.approx(z_T.tolist(), abs=1e-5)
        lam = (z_T - one.origin[layer]) / one.magnitude[layer]
        assert [row[layer] for row in found.in_units] == pytest.approx(lam.tolist(), abs=1e-5)


def test_units(plant: Plant) -> None:
    one = concept()
    (absolute,) = trace_prompt(plant, [one], [3, 9], "absolute")
    assert absolute.in_units == absolute.raw
    (contrast,) = trace_prompt(plant, [one], [3, 9], "contrast")
    assert contrast.in_units[1][2] == pytest.approx(absolute.raw[1][2] / float(one.magnitude[2]), rel=1e-5)
    with pytest.raises(SpecError):
        trace_prompt(plant, [one], [3, 9], cast(Any, "feet"))


def test_a_layer_without_scale_has_no_units(plant: Plant) -> None:
    (found,) = trace_prompt(plant, [concept(zero=1)], [3, 9])
    assert [row[1] for row in found.in_units] == [None, None]
    assert all(row[0] is not None for row in found.in_units)


def test_a_prompt_that_does_not_fit_is_refused(plant: Plant) -> None:
    with pytest.raises(PlantError):
        trace_prompt(plant, [concept()], [3] * 129)
