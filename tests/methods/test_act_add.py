"""The difference of each position is added at that position, of the prompt alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import ActAdd, compile_program
from steering.program import Scope
from steering.types import at
from tests.plans import WIDTH, act_add, noise
from tests.tolerances import CORE
from tests.toy import toy

PLAN = act_add(4)
BENCH = replace(toy(), plans={"love": PLAN})


def added(length: int, bench: Any = BENCH, **fields: Any) -> torch.Tensor:
    """What is added to a prompt of `length` tokens, (length, D)."""
    term = ActAdd(plan="love", layer=2, **fields).compile(bench)
    (law,) = term.laws.values()
    assert list(term.laws) == [at("resid_pre", 2)]
    assert not any(scope.steers_step(step) for scope in (term.scope, *term.scopes) for step in range(3))
    x = noise(length, WIDTH, seed=8)
    whole = torch.zeros_like(x)
    for channel, scope in enumerate(term.scopes):
        one = replace(law, strength=law.strength * (torch.arange(law.rank) == channel))
        chosen = torch.from_numpy(scope.prompt_mask(length))
        whole[chosen] += (one(x, x) - x)[chosen]
    return whole


@pytest.mark.parametrize("strength", [1.0, 5.0, -2.0])
def test_each_position_gets_its_own_difference(strength: float) -> None:
    expected = torch.zeros(6, WIDTH, dtype=torch.float64)
    expected[:4] = strength * PLAN.difference[1]  # layer 2 is the second of the plan
    torch.testing.assert_close(added(6, strength=strength), expected, **CORE["law"])


def test_the_control_adds_random_directions_of_the_same_lengths() -> None:
    found = added(4, control=True)
    torch.testing.assert_close(found, PLAN.control[1], **CORE["law"])
    torch.testing.assert_close(found.norm(dim=-1), PLAN.difference[1].norm(dim=-1), **CORE["law"])


def test_a_shorter_prompt_gets_as_many_positions_as_it_has() -> None:
    torch.testing.assert_close(added(3), PLAN.difference[1, :3], **CORE["law"])
    assert not added(1).any()  # position 0 is left out, and there is no other


def test_position_0_is_steered_on_request_alone() -> None:
    differs = replace(PLAN, difference=PLAN.difference + 1.0)
    bench = replace(BENCH, plans={"love": differs})
    assert not added(4, bench)[0].any()
    torch.testing.assert_close(added(4, bench, first=True), differs.difference[1], **CORE["law"])
    assert ActAdd(plan="love", layer=2, first=True).compile(BENCH).rank == 3  # the same token: nothing to add


def test_the_cap_holds_at_every_position() -> None:
    x = noise(4, WIDTH, seed=8)
    effort = added(4, max_effort=0.05)[1:].norm(dim=-1) / x[1:].norm(dim=-1)
    torch.testing.assert_close(effort, torch.full_like(effort, 0.05), rtol=1e-9, atol=0)


def test_strength_is_a_knob_of_one_slot() -> None:
    assert len({compile_program([ActAdd(plan="love", layer=2, strength=a)], BENCH).shape for a in (1.0, 3.0)}) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"layer": 2.0}, "layer"),
        ({"layer": True}, "layer"),
        ({"layer": 2, "layers": (2,)}, "layers"),
        ({"layer": 2, "apply": Scope("all", "all")}, "apply"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        ActAdd(plan="love", **fields)
    assert caught.value.param == param


def test_what_the_plan_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(SpecError) as caught:
        ActAdd(plan="love", layer=0).compile(BENCH)
    assert caught.value.param == "layer"
    only_first = PLAN.difference.clone()
    only_first[:, 1:], only_first[:, 0] = 0, 1
    bench = replace(BENCH, plans={"love": replace(PLAN, difference=only_first)})
    with pytest.raises(SpecError) as caught:
        ActAdd(plan="love", layer=2).compile(bench)
    assert caught.value.param == "first"
    assert ActAdd(plan="love", layer=2, first=True).compile(bench).rank == 1
