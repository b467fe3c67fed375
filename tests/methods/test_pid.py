"""S-PID as laws equals the published loop over the layers, with its running sum and its rule for emptying it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.methods import Pid
from tests.tolerances import CORE
from tests.toy import Toy, run, states, toy

X = states(4, 6)


def published(bench: Toy, pid: Pid, layers: range, x: Tensor) -> list[Tensor]:
    """Outputs of every block: e_sum is emptied after the error is added, at indices that are multiples."""
    tone, outputs = bench.tone, []
    e_sum, e_prev = torch.zeros_like(x), torch.zeros_like(x)
    for layer, A in enumerate(bench.A_LDD):
        u = torch.zeros_like(x)
        if layer in layers:
            v, beta = tone.direction[layer], tone.origin[layer] + pid.setpoint * tone.magnitude[layer]
            e = torch.outer(beta - x @ v, v)
            e_sum = e_sum + e
            if layer % pid.reset_every == 0:
                e_sum = torch.zeros_like(e_sum)
            u = pid.strength * (pid.kp * e + pid.ki * e_sum + pid.kd * (e - e_prev))
            e_prev = e
        x = x @ A.mT + u
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("reset_every", [1, 2, 3, 10])
@pytest.mark.parametrize(("first", "last"), [(0, 6), (1, 7), (3, 5), (4, 4)])
@pytest.mark.parametrize("terms", [(0.7, 0.05, 0.1), (0.0, 0.3, 0.0), (0.5, 0.0, 0.2), (0.0, 0.0, 0.4)])
def test_equals_the_published_loop(reset_every: int, first: int, last: int, terms: tuple[float, float, float]) -> None:
    bench, layers = toy(depth=8, first=0), range(first, last + 1)
    kp, ki, kd = terms
    pid = Pid(
        concept="tone", setpoint=1.2, strength=0.8, layers=tuple(layers), kp=kp, ki=ki, kd=kd, reset_every=reset_every
    )
    if not kp and not kd and all(layer % reset_every == 0 for layer in layers):
        with pytest.raises(SpecError, match="has an effect"):  # the sum is empty wherever it would be used
            pid.compile(bench)
        return
    _, outputs = run(bench.A_LDD, pid.compile(bench).laws, X)
    for actual, expected in zip(outputs, published(bench, pid, layers, X), strict=True):
        torch.testing.assert_close(actual, expected, **CORE["law"])


def test_the_default_window_over_more_than_ten_blocks() -> None:
    bench = toy(depth=13, first=1)
    pid = Pid(concept="tone", setpoint=1.0, ki=0.2)
    _, outputs = run(bench.A_LDD, pid.compile(bench).laws, X)
    for actual, expected in zip(outputs, published(bench, pid, range(1, 13), X), strict=True):
        torch.testing.assert_close(actual, expected, **CORE["law"])
    reads = {layer: {r.read.layer for r in pid.compile(bench).laws if r.write.layer == layer} for layer in (10, 11, 12)}
    assert reads == {10: {9, 10}, 11: {10, 11}, 12: {11, 12}}


def test_blocks_left_out_do_not_stop_the_window_from_ending() -> None:
    """Block 4 is not controlled, yet the sum starts anew behind it."""
    bench = toy(depth=8, first=0)
    laws = Pid(concept="tone", setpoint=1.0, layers=(2, 3, 5, 6), kp=1.0, ki=0.5, kd=0.0, reset_every=4).compile(bench)
    assert {r.read.layer for r in laws.laws if r.write.layer == 6} == {5, 6}
    assert {r.read.layer for r in laws.laws if r.write.layer == 3} == {2, 3}


def test_one_token_s_control_depends_on_that_token_alone() -> None:
    bench = toy(depth=8, first=0)
    laws = Pid(concept="tone", setpoint=1.0, ki=0.3).compile(bench).laws
    together = run(bench.A_LDD, laws, X)[1][-1]
    alone = torch.cat([run(bench.A_LDD, laws, x[None])[1][-1] for x in X])
    torch.testing.assert_close(together, alone, **CORE["law"])


def test_caps_of_one_block_share_the_bound() -> None:
    bench, cap = toy(depth=8, first=0), 0.02
    laws = Pid(concept="tone", setpoint=9.0, ki=0.3, max_effort=cap).compile(bench).laws
    for write in range(8):
        y = torch.zeros_like(X)
        for route, law in laws.items():
            if route.write.layer == write:
                y = law(y, X)  # every read sees a state of the same norm
        assert float((y.norm(dim=-1) / X.norm(dim=-1)).max()) <= cap * (1 + CORE["bound"])


def test_no_term_at_all_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        Pid(concept="tone", setpoint=1.0, kp=0.0, ki=0.0, kd=0.0)
    assert caught.value.param == "kp"
