"""Clamp: the projection is the setpoint exactly, and nothing else of the state moves."""

from __future__ import annotations

import pytest
import torch

from steering.methods import Clamp
from tests.tolerances import CORE
from tests.toy import run, states, toy

TOY = toy(depth=5)
X = states(6, TOY.width)


def test_the_projection_is_the_setpoint_at_every_controlled_input() -> None:
    term = Clamp(concept="tone", setpoint=0.75).compile(TOY)
    inputs, _ = run(TOY.A_LDD, term.laws, X)
    tone = TOY.tone
    for layer in tone.layers:
        beta = tone.origin[layer] + 0.75 * tone.magnitude[layer]
        torch.testing.assert_close(inputs[layer] @ tone.direction[layer], beta.expand(6), **CORE["law"])


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_equals_the_least_norm_edit(strength: float) -> None:
    term = Clamp(concept="tone", setpoint=-2.0, units="absolute", strength=strength, layers=(2, 3)).compile(TOY)
    inputs, outputs = run(TOY.A_LDD, term.laws, X)
    x = X
    for layer, A in enumerate(TOY.A_LDD):
        if layer in (2, 3):
            v = TOY.tone.direction[layer]
            x = x + strength * torch.outer(-2.0 - x @ v, v)
        torch.testing.assert_close(inputs[layer], x, **CORE["law"])
        x = x @ A.mT
        torch.testing.assert_close(outputs[layer], x, **CORE["law"])
