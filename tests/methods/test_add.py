"""Addition is the explicit sum, and strength 1 over any number of layers is one contrast in all."""

from __future__ import annotations

import pytest
import torch

from steering.methods import Add
from tests.tolerances import CORE
from tests.toy import run, states, toy

TOY = toy(depth=5)
X = states(6, TOY.width)


@pytest.mark.parametrize("layers", [None, (3,), (0, 4)])
@pytest.mark.parametrize("strength", [1.0, -2.5])
def test_equals_the_explicit_sum(strength: float, layers: tuple[int, ...] | None) -> None:
    inputs, outputs = run(TOY.A_LDD, Add(concept="tone", strength=strength, layers=layers).compile(TOY).laws, X)
    x, chosen = X, layers or TOY.tone.layers
    for layer, A in enumerate(TOY.A_LDD):
        torch.testing.assert_close(inputs[layer], x, **CORE["law"])
        x = x @ A.mT
        if layer in chosen:
            E = TOY.tone.magnitude[layer + 1] * TOY.tone.direction[layer + 1]
            x = x + strength / len(chosen) * E
        torch.testing.assert_close(outputs[layer], x, **CORE["law"])


def test_the_control_is_open_loop() -> None:
    laws = Add(concept="tone").compile(TOY).laws
    for law in laws.values():
        y = torch.zeros_like(X)
        torch.testing.assert_close(law(y, X), law(y, 3 * X + 1), **CORE["law"])


def test_a_cap_below_the_push_shortens_it() -> None:
    (law,) = Add(concept="tone", layers=(2,), max_effort=0.01).compile(TOY).laws.values()
    pushed = law(torch.zeros_like(X), X)
    torch.testing.assert_close(pushed.norm(dim=-1), 0.01 * X.norm(dim=-1), **CORE["law"])
