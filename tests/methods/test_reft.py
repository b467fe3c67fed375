"""LoReFT and DiReFT are laws, exactly, and act where they were trained unless a request says otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Reft
from steering.plan import ReftPlan
from steering.program import Positions, Scope
from steering.types import at
from tests.plans import WIDTH, noise, reft
from tests.tolerances import CORE
from tests.toy import toy

H = noise(5, WIDTH, seed=9)


def steered(plan: ReftPlan, layer: int, **fields: Any) -> torch.Tensor:
    (law,) = Reft(plan="edit", layers=(layer,), **fields).compile(replace(toy(), plans={"edit": plan})).laws.values()
    return law(H, H)


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize(("row", "layer"), [(0, 1), (1, 3)])
def test_equals_the_published_formulas(row: int, layer: int, strength: float) -> None:
    for form in ("loreft", "direft"):
        plan = reft(form)
        R, W, b = plan.rotation[row], plan.weight[row], plan.bias[row]
        inner = H @ W.mT + b - (H @ R.mT if form == "loreft" else 0)
        torch.testing.assert_close(steered(plan, layer, strength=strength), H + strength * inner @ R, **CORE["law"])


def test_loreft_sets_the_rotated_state() -> None:
    plan = reft()
    out = steered(plan, 1)
    torch.testing.assert_close(out @ plan.rotation[0].mT, H @ plan.weight[0].mT + plan.bias[0], **CORE["law"])


def test_it_acts_at_block_outputs_and_at_the_trained_positions_of_the_prompt_alone() -> None:
    term = Reft(plan="edit").compile(replace(toy(), plans={"edit": reft(first=2, last=1)}))
    assert sorted(term.laws) == [at("resid_post", 1), at("resid_post", 3)]
    assert term.scope == Scope(Positions((0, 1, -1)), "none")
    assert term.scope.prompt_mask(6).tolist() == [True, True, False, False, False, True]
    assert term.scope.prompt_mask(2).tolist() == [True, True]
    only_last = Reft(plan="edit").compile(replace(toy(), plans={"edit": reft(first=0, last=2)}))
    assert only_last.scope.prompt_mask(4).tolist() == [False, False, True, True]


def test_a_request_may_say_where() -> None:
    bench = replace(toy(), plans={"edit": reft()})
    assert Reft(plan="edit", positions="apply").compile(bench).scope == Scope()
    chosen = Scope("all", "none")
    assert Reft(plan="edit", positions="apply", apply=chosen).compile(bench).scope == chosen
    with pytest.raises(SpecError, match="since `apply` is given") as caught:
        Reft(plan="edit", apply=chosen)
    assert caught.value.param == "positions"


def test_a_plan_without_positions_needs_apply() -> None:
    bench = replace(toy(), plans={"edit": reft(first=0, last=0)})
    with pytest.raises(SpecError, match="does not tell its trained positions") as caught:
        Reft(plan="edit").compile(bench)
    assert caught.value.param == "positions"
    assert Reft(plan="edit", positions="apply").compile(bench).acts


def test_an_unknown_word_and_a_block_without_an_edit_are_refused_by_name() -> None:
    with pytest.raises(SpecError) as caught:
        Reft(plan="edit", positions="first")  # type: ignore[arg-type]
    assert caught.value.param == "positions"
    with pytest.raises(SpecError, match=r"has, \[1, 3\], got 2") as caught:
        steered(reft(), 2)
    assert caught.value.param == "layers"


@pytest.mark.parametrize("form", ["loreft", "direft"])
def test_the_cap_bounds_the_whole_control(form: Any) -> None:
    effort = (steered(reft(form), 1, max_effort=0.05) - H).norm(dim=-1) / H.norm(dim=-1)
    assert 0.01 < float(effort.max()) <= 0.05 * (1 + CORE["bound"])
