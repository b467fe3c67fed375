"""A request's sparsity is a level of the plan's, its masks are those of the formula, and chance drops as many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steering.edit import Mask, Sparse
from steering.errors import SpecError
from steering.methods import compile_program
from steering.methods.sparsity import Sparsity
from steering.plan import SparsityPlan
from steering.program import Guard, Positions, Program, Scope, Window
from steering.types import Route, edit_at
from tests import plans
from tests.plans import noise
from tests.tolerances import CORE
from tests.toy import Toy, toy

PLAN = plans.sparsity()
BENCH = replace(toy(), plans={"light": PLAN, "stored": plans.stored(PLAN)})
ATTN, MLP = edit_at("sparse", "attn_in", 1), edit_at("sparse", "mlp_act", 1)


def laws(bench: Toy = BENCH, **changes: Any) -> dict[Route, Any]:
    return dict(Sparsity(plan="light", **changes).compile(bench).laws)


def test_the_edit_is_the_formula() -> None:
    """W(m⊙x) + W V Vᵀ ((1−m)⊙x), with numpy, at every site of every block."""
    x, W = 2 * noise(7, 6, seed=1), noise(5, 6, seed=2).numpy()
    found = laws()
    assert set(found) == {edit_at("sparse", tap, layer) for tap in ("attn_in", "mlp_act") for layer in (1, 2)}  # type: ignore[arg-type]
    for route, edit in found.items():
        row, s = PLAN.layers.index(route.write.layer), PLAN.sites.index(route.write.tap)
        weight, V = (t[row][..., 6 * s : 6 * s + 6].numpy() for t in (PLAN.weight, PLAN.rest))
        m = (np.abs(x.numpy()) * weight > float(PLAN.threshold[row, s, 1])).astype(float)
        expected = (m * x.numpy() + ((1 - m) * x.numpy()) @ V.T @ V) @ W.T
        np.testing.assert_allclose(edit(x, x).numpy() @ W.T, expected, **CORE["law"])
        assert 0 < m.mean() < 1


def test_levels_are_met_and_met_halfway_between() -> None:
    for sparsity, share, threshold in ((0.25, 0.3, 0.4), (0.5, 0.6, 0.9), (0.625, 0.75, 1.45), (0.125, 0.15, 0.2)):
        found = PLAN.at(sparsity)
        torch.testing.assert_close(found[0][:, 1], torch.full((2,), share, dtype=torch.float64), **CORE["law"])
        torch.testing.assert_close(found[1][:, 1], torch.full((2,), threshold, dtype=torch.float64), **CORE["law"])
        edit = laws(sparsity=sparsity)[MLP]
        assert float(edit.threshold) == pytest.approx(threshold)
    assert float(laws()[MLP].threshold) == 0.9


def test_top_k_keeps_as_many_of_each_token() -> None:
    x = noise(9, 6, seed=3)
    for sparsity, kept in ((0.25, 4), (0.5, 2), (0.75, 1)):
        edit = laws(sparsity=sparsity, rule="top_k")[MLP]
        assert edit.kept(x, 0).sum(-1).tolist() == [kept] * 9
    assert float(laws(rule="top_k")[ATTN].count) == 3


def test_a_site_of_which_nothing_goes_is_left_alone() -> None:
    share = PLAN.share.clone()
    share[:, 0] = 0
    bench = replace(BENCH, plans={"light": replace(PLAN, share=share)})
    assert {route.write.tap for route in laws(bench)} == {"mlp_act"}
    with pytest.raises(SpecError) as caught:
        laws(bench, sites=("attn_in",))
    assert caught.value.param == "plan"


def test_layers_and_sites_are_chosen() -> None:
    assert set(laws(layers=(2,), sites=("mlp_act",))) == {edit_at("sparse", "mlp_act", 2)}


def test_the_control_drops_as_many_at_random() -> None:
    found = laws(control=True)
    for route, edit in found.items():
        assert isinstance(edit, Mask)
        assert route.form == "mask"
        gone = 3 if route.write.tap == "attn_in" else 4
        assert int((edit.scale == 0).sum()) == gone
        assert int((edit.scale == 1).sum()) == 6 - gone
    assert torch.equal(
        found[edit_at("mask", "mlp_act", 1)].scale, laws(control=True)[edit_at("mask", "mlp_act", 1)].scale
    )
    # More go, and those that went before go too.
    more = laws(control=True, sparsity=0.75)[edit_at("mask", "mlp_act", 1)]
    assert bool((more.scale <= found[edit_at("mask", "mlp_act", 1)].scale).all())


def test_what_is_reported() -> None:
    term = Sparsity(plan="light").compile(BENCH)
    assert (term.units, term.target) == ("fraction", pytest.approx((0.5 + 0.6) / 2))
    assert dict(term.gauges) == dict.fromkeys(term.laws, (0.0, 1.0))
    assert Sparsity(plan="light", sites=("mlp_act",)).compile(BENCH).target == pytest.approx(0.6)


def test_prompts_stay_dense_unless_asked_for() -> None:
    assert Sparsity(plan="light").compile(BENCH).scope == Scope("none", "all")
    whole = Sparsity(plan="light", apply=Scope("all", "none")).compile(BENCH).scope
    assert isinstance(whole.prompt, Window)
    assert whole.prompt_mask(4).tolist() == [False, True, True, True]
    own = Scope(Positions((0,)), "all")
    assert Sparsity(plan="light", apply=own).compile(BENCH).scope == own


@pytest.mark.parametrize(("field", "value"), [("strength", 0.5), ("max_effort", 0.1)])
def test_a_part_of_it_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SpecError) as caught:
        Sparsity(plan="rest", **{field: value})
    assert caught.value.param == field
    with pytest.raises(SpecError) as caught:
        compile_program([Sparsity(plan="stored")], BENCH, Guard(max_effort=1.0))
    assert caught.value.param == "guard.max_effort"
    assert compile_program([Sparsity(plan="stored", strength=0.0)], BENCH, Guard(max_effort=1.0)).acts is False


def test_a_stored_plan_compiles_to_a_program() -> None:
    program = Program((Sparsity(plan="stored").compile(BENCH),))
    assert all(isinstance(edit, Sparse) for edit in program.laws.values())
    assert program.acts
    assert not program.blanks
    plan = SparsityPlan.from_artifact(BENCH.plans["stored"].artifact())
    assert set(plan.edits(0.5)) == {route.write for route in program.laws}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"sparsity": 0.8}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"rule": "most"}, "rule"),
        ({"sites": ()}, "sites"),
        ({"sites": ("mlp_out",)}, "sites"),
        ({"sites": ("mlp_in",)}, "sites"),
        ({"layers": (0,)}, "layers"),
    ],
)
def test_what_the_plan_does_not_have_is_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        laws(**changes)
    assert caught.value.param == param
