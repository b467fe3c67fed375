"""Addition is the explicit sum, and strength 1 over any number of layers is one contrast in all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Add
from steering.methods.inline import InlineTensor, encoded
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


@pytest.mark.parametrize("layers", [(3,), (0, 4)])
def test_relative_to_the_running_norm(layers: tuple[int, ...]) -> None:
    """u = (a / n) ‖x_l‖ v_{l+1}: the effort is what was asked for, at every token and layer."""
    term = Add(concept="tone", strength=-0.3, layers=layers, scale="running_norm").compile(TOY)
    inputs, outputs = run(TOY.A_LDD, term.laws, X)
    for layer in layers:
        plain = inputs[layer] @ TOY.A_LDD[layer].mT
        expected = -0.3 / len(layers) * inputs[layer].norm(dim=-1, keepdim=True) * TOY.tone.direction[layer + 1]
        torch.testing.assert_close(outputs[layer] - plain, expected, rtol=1e-10, atol=1e-10)
    assert set(term.gauges) == set(term.laws)


def test_relative_vectors_of_the_request_are_made_unit() -> None:
    z = torch.arange(1.0, TOY.width + 1)
    for scale in (1.0, 1e-30, 3e37):
        sent: Any = encoded(scale * z)
        inline = {"layer.2": InlineTensor(**sent | {"shape": tuple(sent["shape"])})}
        (law,) = Add(inline=inline, strength=0.5, scale="running_norm").compile(TOY).laws.values()
        pushed = law(torch.zeros_like(X), X)
        expected = 0.5 * X.norm(dim=-1, keepdim=True) * (z / z.norm()).double()
        torch.testing.assert_close(pushed, expected, **CORE["float32"])


def test_an_unknown_scale_is_refused_by_name() -> None:
    with pytest.raises(SpecError) as caught:
        Add(concept="tone", scale="relative")  # type: ignore[arg-type]
    assert caught.value.param == "scale"
