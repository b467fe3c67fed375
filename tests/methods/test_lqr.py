"""A-LQR in its rank-1 form equals the published controller with its matrices formed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.control import identity_gains, scalar_gains
from steering.errors import SpecError
from steering.methods import Lqr
from tests.tolerances import CORE
from tests.toy import WEIGHTS, run, states, toy

TOY = toy(depth=5)
X = states(6, TOY.width)


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize("layers", [None, (2, 4)])
def test_equals_the_regulator_with_its_matrices_formed(strength: float, layers: tuple[int, ...] | None) -> None:
    lqr = Lqr(concept="tone", setpoint=1.5, strength=strength, layers=layers)
    inputs, outputs = run(TOY.A_LDD, lqr.compile(TOY).laws, X)
    x, tone = X, TOY.tone
    for layer, (A, K) in enumerate(zip(TOY.A_LDD, TOY.K_LDD, strict=True)):
        torch.testing.assert_close(inputs[layer], x, **CORE["law"])
        v, beta = tone.direction[layer], tone.origin[layer] + 1.5 * tone.magnitude[layer]
        error = (beta - x @ v)[:, None] * v  # α v, the least change of the state that reaches β
        acts = layer in (layers or tone.layers)
        x = x @ A.mT + strength * acts * error @ K.mT
        torch.testing.assert_close(outputs[layer], x, **CORE["law"])


def test_it_reads_the_input_of_a_block_and_writes_its_output() -> None:
    term = Lqr(concept="tone", setpoint=1.0).compile(TOY)
    assert [str(route) for route in term.laws] == [f"resid_pre.{i}->resid_post.{i}" for i in (1, 2, 3, 4)]
    assert all(law.rank == 1 for law in term.laws.values())


def test_identity_gains_follow_from_the_weights() -> None:
    laws = list(Lqr(concept="tone", setpoint=1.0, gains="identity").compile(TOY).laws.values())
    expected = identity_gains(TOY.tone.direction[1:], WEIGHTS)
    for law, gain in zip(laws, expected, strict=True):
        torch.testing.assert_close(law.gain[0].double(), gain, **CORE["float32"])


def test_the_error_shrinks_by_one_minus_the_gain_where_blocks_are_the_identity() -> None:
    v = TOY.tone.direction[:1].expand(6, -1)
    level = {"direction": v, "magnitude": torch.ones(6), "origin": torch.zeros(6)}
    bench = replace(TOY, A_LDD=torch.eye(6, dtype=torch.float64).expand(5, 6, 6), tone=replace(TOY.tone, **level))
    inputs, outputs = run(bench.A_LDD, Lqr(concept="tone", setpoint=1.5, gains="identity").compile(bench).laws, X)
    states_LT = torch.stack([*inputs, outputs[-1]]) @ v[0]
    shrunk_LT = (1 - scalar_gains(4, WEIGHTS))[:, None] * (1.5 - states_LT[1:-1])
    torch.testing.assert_close(1.5 - states_LT[2:], shrunk_LT, **CORE["float32"])


def test_gains_and_layers_that_were_not_fitted_are_refused() -> None:
    with pytest.raises(SpecError) as caught:
        Lqr(concept="tone", setpoint=1.0, gains="matrix_free").compile(TOY)
    assert caught.value.param == "gains"
    with pytest.raises(SpecError, match=r"\[1, 2, 3, 4\], got 0") as caught:
        Lqr(concept="tone", setpoint=1.0, layers=(0, 1)).compile(TOY)
    assert caught.value.param == "layers"
