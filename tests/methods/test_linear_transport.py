"""A transported coordinate is λ(ωz + b) + (1 − λ)z inside its support and itself outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.edit import Mask
from steering.errors import SpecError
from steering.methods import LinearTransport
from steering.program import Scope, Window
from steering.types import edit_at
from tests.plans import WIDTH, noise, transport
from tests.tolerances import CORE
from tests.toy import toy

PLAN = transport()
BENCH = replace(toy(), plans={"moved": PLAN})
X = 4 * noise(30, WIDTH, seed=9)


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("control", [False, True])
def test_equals_the_formula(strength: float, control: bool) -> None:
    term = LinearTransport(plan="moved", strength=strength, control=control).compile(BENCH)
    assert set(term.laws) == {edit_at("mask", "resid_post", layer) for layer in (1, 3)}
    for row, layer in enumerate(PLAN.layers):
        found = term.laws[edit_at("mask", "resid_post", layer)](X, X)
        scale, shift = (
            (PLAN.control_scale[row], PLAN.control_shift[row]) if control else (PLAN.scale[row], PLAN.shift[row])
        )
        outside = 0
        for t in range(len(X)):
            for i in range(WIDTH):
                z = float(X[t, i])
                inside = float(PLAN.low[row, i]) <= z <= float(PLAN.high[row, i])
                outside += not inside
                expected = strength * (float(scale[i]) * z + float(shift[i])) + (1 - strength) * z if inside else z
                assert float(found[t, i]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert 0 < outside < X.numel()


def test_position_0_stays_and_the_share_inside_is_reported() -> None:
    term = LinearTransport(plan="moved", apply=Scope(prompt="all")).compile(BENCH)
    assert term.scope.prompt == Window((1, 2**31))
    assert (term.units, term.target) == ("fraction", None)
    assert set(term.gauges) == set(term.laws)


def test_the_site_is_the_plan_s() -> None:
    bench = replace(BENCH, plans={"moved": replace(PLAN, site="mlp_out")})
    term = LinearTransport(plan="moved", layers=(3,)).compile(bench)
    assert list(term.laws) == [edit_at("mask", "mlp_out", 3)]


def test_the_effort_is_bounded() -> None:
    term = LinearTransport(plan="moved", layers=(1,), max_effort=0.05).compile(BENCH)
    (mask,) = term.laws.values()
    assert isinstance(mask, Mask)
    effort = (mask(X, X) - X).norm(dim=-1) / X.norm(dim=-1)
    assert 0.04 < float(effort.max()) <= 0.05 * (1 + 1e-9)
    free = LinearTransport(plan="moved", layers=(1,)).compile(BENCH).laws[edit_at("mask", "resid_post", 1)]
    u = free(X, X) - X
    torch.testing.assert_close(
        mask(X, X), X + u * (0.05 * X.norm(dim=-1) / u.norm(dim=-1)).clamp_max(1)[:, None], **CORE["law"]
    )


def test_maps_that_change_nothing_are_refused() -> None:
    """The classes were alike: the request would be served unsteered."""
    scale, shift = PLAN.scale.clone(), PLAN.shift.clone()
    scale[0], shift[0] = 1, 0
    bench = replace(BENCH, plans={"moved": replace(PLAN, scale=scale, shift=shift)})
    assert len(LinearTransport(plan="moved").compile(bench).laws) == 2
    with pytest.raises(SpecError, match="maps change something") as caught:
        LinearTransport(plan="moved", layers=(1,)).compile(bench)
    assert caught.value.param == "plan"
