"""Modules are out as if they were zero, for a whole request, and in the order of the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from steering.condition import When
from steering.errors import SpecError
from steering.methods import compile_program
from steering.methods.skip_layers import SkipLayers
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.program import Guard, Program, Scope
from steering.types import Site
from tests import plans
from tests.plants import prompts, tiny
from tests.tolerances import PLANT
from tests.toy import toy

BENCH = replace(toy(), plans={"drops": plans.layers()})


def sites(**fields: Any) -> set[str]:
    return {str(route.write) for route in SkipLayers(**fields).compile(BENCH).laws}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attention": 2}, {"attn_out.2", "attn_out.1"}),
        ({"mlp": 1}, {"mlp_out.3"}),
        ({"attention": 1, "mlp": 2}, {"attn_out.2", "mlp_out.3", "mlp_out.2"}),
        ({"joint": 3}, {"attn_out.2", "mlp_out.3", "attn_out.1"}),
        ({"blocks": 1}, {"attn_out.2", "mlp_out.2"}),
        ({"blocks": 2}, {"attn_out.2", "mlp_out.2", "attn_out.1", "mlp_out.1"}),
        ({"attention": 1, "mlp_layers": (0,)}, {"attn_out.2", "mlp_out.0"}),
        ({"attention": 1, "layers": (0, 3)}, {"attn_out.3"}),
        ({"attention": 2, "control": True}, {"attn_out.1", "attn_out.0"}),
        ({"mlp": 1, "control": True}, {"mlp_out.0"}),
        ({"joint": 2, "control": True}, {"mlp_out.0", "attn_out.1"}),
        ({"blocks": 1, "control": True}, {"attn_out.1", "mlp_out.1"}),
    ],
)
def test_the_first_of_the_plan_s_lists_go(fields: dict[str, Any], expected: set[str]) -> None:
    assert sites(plan="drops", **fields) == expected


def test_a_receipt_names_the_modules_and_no_bound_leaves_a_part() -> None:
    term = SkipLayers(plan="drops", attention=1, mlp=1).compile(BENCH)
    assert {str(route.read) for route in term.gauges} == {"attn_out.2", "mlp_out.3"}
    with pytest.raises(SpecError) as caught:
        compile_program([SkipLayers(plan="drops", attention=1)], BENCH, Guard(max_effort=1.0))
    assert caught.value.param == "guard.max_effort"


def test_without_a_plan_modules_are_named() -> None:
    assert sites(attn_layers=(3,), mlp_layers=(1, 3)) == {"attn_out.3", "mlp_out.1", "mlp_out.3"}
    assert SkipLayers(mlp_layers=(1,)).compile(BENCH).label == "skip_layers"


def test_the_engine_is_told_what_need_not_be_computed() -> None:
    term = SkipLayers(plan="drops", attention=1, mlp=1).compile(BENCH)
    assert term.is_always
    assert Program((term,)).blanks == {Site("attn_out", 2), Site("mlp_out", 3)}
    assert not Program((term,), Guard(max_effort=1.0)).blanks
    other = SkipLayers(mlp_layers=(0,)).compile(BENCH)
    assert Program((term, other)).blanks == {Site("attn_out", 2), Site("mlp_out", 3), Site("mlp_out", 0)}
    idle = SkipLayers(plan="drops", attention=1, strength=0.0).compile(BENCH)
    assert not idle.acts
    assert not Program((idle,)).blanks


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "mixtral"])
def test_a_skipped_module_adds_nothing_to_the_stream(family: str) -> None:
    """Where a post-norm follows too: the model with the modules' outputs replaced by zeros behind it."""
    plant = Plant(tiny(family))
    bench = replace(BENCH, A_LDD=torch.zeros(plant.depth, plant.width, plant.width))
    term = SkipLayers(attn_layers=(1,), mlp_layers=(0, 1)).compile(bench)
    edited, zeroed = plant.shell(), plant.shell()
    for route, mask in term.laws.items():
        plant.tap(edited, route.write, lambda x, mask=mask: mask(x.flatten(0, 1), x.flatten(0, 1)).view_as(x))
    for layer, block in enumerate(blocks_of(zeroed, plant.layout)):
        names = [plant.layout.attention] * (layer == 1) + [plant.layout.mlp] * (layer < 2)
        behind = {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
        for name in names:
            last: Any = block.get_submodule(behind[name] if family in ("gemma2", "olmo2") else name)
            if name == plant.layout.attention and last is block.get_submodule(name):
                last.register_forward_hook(lambda m, a, out: (torch.zeros_like(out[0]), *out[1:]))
            else:
                last.register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    ids = torch.tensor(prompts(1))
    with torch.no_grad():
        found, expected, plain = (model(input_ids=ids).logits for model in (edited, zeroed, plant.model))
    torch.testing.assert_close(found, expected, **PLANT["float32"])
    assert float((plain - expected).abs().max()) > 0.1


def test_json_round_trip() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(SkipLayers)
    for spec in (
        SkipLayers(plan="drops", attention=2, mlp=1, control=True, layers=(1, 2)),
        SkipLayers(attn_layers=(1,), mlp_layers=(2,), strength=0.0),
    ):
        assert adapter.validate_json(adapter.dump_json(spec)) == spec
    assert adapter.validate_python({"plan": "drops", "joint": 1}).apply == Scope("all", "all")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "plan"),
        ({"attention": 1}, "plan"),
        ({"attn_layers": (1,), "joint": 1}, "plan"),
        ({"attn_layers": (1,), "control": True}, "plan"),
        ({"attn_layers": (1,), "layers": (1,)}, "plan"),
        ({"plan": "drops"}, "attention"),
        ({"plan": "drops", "attention": 0}, "attention"),
        ({"plan": "drops", "attention": -1}, "attention"),
        ({"plan": "drops", "mlp": 1.5}, "mlp"),
        ({"plan": "drops", "attention": 5}, "attention"),
        ({"plan": "drops", "joint": 9}, "joint"),
        ({"plan": "drops", "attention": 2, "layers": (1,)}, "attention"),
        ({"plan": "drops", "attention": 1, "layers": (4,)}, "layers"),
        ({"plan": "absent", "attention": 1}, "plan"),
        ({"attn_layers": (4,)}, "attn_layers"),
        ({"mlp_layers": (-1,)}, "mlp_layers"),
        ({"mlp_layers": (1,), "strength": 0.5}, "strength"),
        ({"mlp_layers": (1,), "strength": -1.0}, "strength"),
        ({"mlp_layers": (1,), "max_effort": 0.5}, "max_effort"),
        ({"mlp_layers": (1,), "apply": Scope()}, "apply"),
        ({"mlp_layers": (1,), "when": When(concept="tone", layer=1, above=0.0)}, "when"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        SkipLayers(**fields).compile(BENCH)
    assert caught.value.param == param
