"""Each mode is an edit of single columns of the MLP's last weight, and no other unit is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.methods import Neurons, compile_program
from steering.plan import NeuronsPlan
from steering.plant.plant import Plant
from steering.program import Scope, Window
from steering.types import Site, edit_at
from tests.plans import WIDTH, neurons, noise
from tests.plants import tiny
from tests.tolerances import CORE, PLANT
from tests.toy import toy

PLAN = neurons()
BENCH = replace(toy(), plans={"experts": PLAN})
X = noise(7, WIDTH, seed=8)


def edits(**fields: Any) -> dict[int, torch.Tensor]:
    """What the masks make of X, by block."""
    laws = Neurons(plan="experts", **fields).compile(BENCH).laws
    assert set(laws) <= {edit_at("mask", "mlp_act", layer) for layer in (1, 3)}
    return {route.write.layer: law(X, X) for route, law in laws.items()}


def column(mode: str, factor: float | None, row: int, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    area, part = float(PLAN.auroc[row]), 0.5 if factor is None else factor
    return {
        "zero": 0 * x,
        "damp": part * x,
        "aura": x * (1 - 2 * max(area - 0.5, 0)),
        "mean": mean.expand_as(x),
        "shrink": x + part * (mean - x),
    }[mode]


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(
    ("mode", "factor"),
    [("zero", None), ("damp", None), ("damp", 2.0), ("aura", None), ("mean", None), ("shrink", None), ("shrink", 0.9)],
)
def test_the_chosen_columns_change_and_no_other(
    mode: Any, factor: float | None, control: bool, strength: float
) -> None:
    found = edits(mode=mode, factor=factor, control=control, strength=strength)
    index, mean = (PLAN.control, PLAN.control_negative) if control else (PLAN.index, PLAN.negative)
    for layer, rows in ((3, (0, 3)), (1, (1,))):
        expected = X.clone()
        for row in rows:
            m = int(index[row])
            expected[:, m] += strength * (column(mode, factor, row, X[:, m], mean[row]) - X[:, m])
        torch.testing.assert_close(found[layer], expected, **CORE["law"])
    assert torch.equal(found[1][:, 5], X[:, 5])  # massive


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({}, {3: [1, 4], 1: [0]}),
        ({"sign": "negative"}, {1: [2]}),
        ({"sign": "both"}, {3: [1, 4], 1: [0, 2]}),
        ({"units": 1}, {3: [4]}),
        ({"units": 2, "layers": (3,)}, {3: [1, 4]}),
        ({"units": 3, "sign": "both"}, {3: [4], 1: [0, 2]}),
        ({"layers": (1,), "sign": "both", "units": 1}, {1: [0]}),
    ],
)
def test_units_are_used_in_the_order_of_the_plan(fields: dict[str, Any], units: dict[int, list[int]]) -> None:
    found = edits(mode="zero", **fields)
    assert {layer: (x == 0).all(0).nonzero().flatten().tolist() for layer, x in found.items()} == units


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_silent_units_are_columns_of_the_weight_gone(family: str) -> None:
    """On a model: what the MLP writes is what it writes with those columns of its last weight put to zero."""
    plant = Plant(tiny(family))
    plan = replace(
        PLAN, depth=plant.depth, width=plant.width, layers=(0, 1), spans=(48, 48), layer=torch.tensor([1.0, 1, 0, 0]),
        index=torch.tensor([40.0, 3, 17, 20]), massive=torch.zeros(0, 2),
    )  # fmt: skip
    bench = replace(toy(depth=plant.depth, width=plant.width), plans={"experts": plan})
    term = Neurons(plan="experts", mode="zero", sign="both").compile(bench)
    ids = torch.tensor([[5, 9, 11, 30, 7]])

    def outputs(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [plant.tap(model, Site("resid_post", layer), lambda x: seen.append(x[0].clone())) for layer in (0, 1)]
        with torch.no_grad():
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return seen

    steered = plant.shell()
    for route, law in term.laws.items():
        mask = law.to(torch.float32)
        plant.tap(steered, route.write, lambda x, mask=mask: mask(x[0], x[0])[None])  # type: ignore[misc]
    edited = Plant(tiny(family))
    for route in term.laws:
        gone = plan.index[plan.layer == route.write.layer].long()
        module = edited.model.get_submodule(
            f"model.layers.{route.write.layer}.mlp.down_proj"
            if family == "llama"
            else f"transformer.h.{route.write.layer}.mlp.c_proj"
        )
        weight = module.weight.data
        if family == "llama":
            weight[:, gone] = 0
        else:
            weight[gone] = 0
    for a, b in zip(outputs(steered), outputs(edited.model), strict=True):
        torch.testing.assert_close(a, b, **PLANT["float32"])


def test_position_0_is_left_out_of_the_whole_prompt_only() -> None:
    term = Neurons(plan="experts", apply=Scope("all", "all")).compile(BENCH)
    assert term.scope.prompt_mask(4).tolist() == [False, True, True, True]
    assert (term.units, term.label) == ("fraction", "experts")
    assert dict(term.gauges) == dict.fromkeys(term.laws, (0.0, 1.0))
    whole = Scope(Window((0, 2)), "none")
    assert Neurons(plan="experts", apply=whole).compile(BENCH).scope == whole


def test_strength_is_a_knob_of_one_slot() -> None:
    shapes = {compile_program([Neurons(plan="experts", strength=a)], BENCH).shape for a in (0.1, 1.0, -2.0)}
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "half"}, "mode"),
        ({"sign": "some"}, "sign"),
        ({"factor": 0.5}, "factor"),
        ({"mode": "zero", "factor": 0.5}, "factor"),
        ({"mode": "damp", "factor": 1}, "factor"),
        ({"mode": "shrink", "factor": 0.0}, "factor"),
        ({"mode": "damp", "factor": float("nan")}, "factor"),
        ({"units": 0}, "units"),
        ({"units": True}, "units"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Neurons(plan="experts", **fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"units": 4}, "units"),
        ({"layers": (3,), "sign": "negative"}, "sign"),
        ({"sign": "negative"}, "mode"),  # an AUROC below a half leaves AurA nothing to do
        ({"layers": (2,)}, "layers"),
    ],
)
def test_what_the_plan_does_not_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        Neurons(plan="experts", **fields).compile(BENCH)
    assert caught.value.param == param


def test_a_plan_of_one_class_alone_has_its_own_sign() -> None:
    plan: NeuronsPlan = replace(PLAN, score=-PLAN.score.abs())
    bench = replace(BENCH, plans={"experts": plan})
    with pytest.raises(SpecError, match="units that plan"):
        Neurons(plan="experts").compile(bench)
    assert Neurons(plan="experts", mode="zero", sign="negative").compile(bench).acts
