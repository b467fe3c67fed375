"""Ablation is the projector I − vvᵀ, formed explicitly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Ablate
from tests.tolerances import CORE
from tests.toy import run, states, toy

TOY = toy(depth=5)
X = states(6, TOY.width)
I = torch.eye(TOY.width, dtype=torch.float64)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("source", [None, 5, 0])
def test_equals_the_projector(strength: float, source: int | None) -> None:
    inputs, outputs = run(
        TOY.A_LDD, Ablate(concept="tone", strength=strength, direction_layer=source).compile(TOY).laws, X
    )
    x = X
    for layer, A in enumerate(TOY.A_LDD):
        if layer in TOY.tone.layers:
            v = TOY.tone.direction[layer if source is None else source]
            x = x @ (I - strength * torch.outer(v, v))
        torch.testing.assert_close(inputs[layer], x, **CORE["law"])
        x = x @ A.mT
        torch.testing.assert_close(outputs[layer], x, **CORE["law"])


def test_nothing_of_the_direction_is_left() -> None:
    inputs, _ = run(TOY.A_LDD, Ablate(concept="tone").compile(TOY).laws, X)
    for layer in TOY.tone.layers:
        assert float((inputs[layer] @ TOY.tone.direction[layer]).abs().max()) < CORE["law"]["atol"]


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_strength_is_a_share(value: float) -> None:
    with pytest.raises(SpecError, match=r"\[0, 1\]") as caught:
        Ablate(concept="tone", strength=value)
    assert caught.value.param == "strength"


def test_the_source_layer_must_have_a_direction() -> None:
    direction = TOY.tone.direction.clone()
    direction[0] = 0
    bench = replace(TOY, tone=replace(TOY.tone, direction=direction))
    for source in (0, -1, 6):
        with pytest.raises(SpecError) as caught:
            Ablate(concept="tone", direction_layer=source).compile(bench)
        assert caught.value.param == "direction_layer"
