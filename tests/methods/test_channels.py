"""Channels: scaling a component is scaling its singular value in W_O, formed explicitly, in a real model too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.fit.channels import ChannelsSettings, fit_channels
from steering.methods import Channels
from steering.plan import ChannelsPlan
from steering.plant.plant import Plant
from steering.types import Route, Site
from tests.hooks import OnePlan, hook_laws
from tests.plans import WIDTH, channels, noise
from tests.plants import prompts, tiny, tiny_tokenizer
from tests.tolerances import CORE, PLANT
from tests.toy import toy

PLAN = channels()
BENCH = replace(toy(), plans={"talk": PLAN})
A, Y = noise(5, WIDTH, seed=9), noise(5, WIDTH, seed=10)
FIRST, SECOND = (Route(Site("attn_act", layer), Site("attn_out", layer)) for layer in (1, 2))


def laws(plan: ChannelsPlan = PLAN, **fields: Any) -> dict[Route, Any]:
    return dict(Channels(plan="talk", **fields).compile(replace(BENCH, plans={"talk": plan})).laws)


def component(row: int, heads: tuple[int, ...], probe: Tensor, direction: Tensor) -> Tensor:
    """(a·p) v of one row, head by head."""
    own = A.view(-1, 2, 3)[:, heads[row]]
    return (own @ probe[row])[:, None] * direction[row]


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("scale", [None, 0.0, 2.0, -1.0])
def test_components_are_scaled(scale: float | None, strength: float) -> None:
    """Three channels of block 1 are two components: none is taken twice."""
    found = laws(scale=scale, strength=strength)
    assert set(found) == {FIRST}  # three of the four lie above chance
    parts = sum(component(row, PLAN.source_head, PLAN.probe, PLAN.direction) for row in (0, 1))
    expected = Y + strength * ((scale or 0.0) - 1) * parts
    torch.testing.assert_close(found[FIRST](Y, A), expected, **CORE["law"])


def test_components_are_held() -> None:
    found = laws(channels=(3,), value=1.5)
    assert set(found) == {SECOND}
    now = component(3, PLAN.source_head, PLAN.probe, PLAN.direction)
    torch.testing.assert_close(found[SECOND](Y, A), Y - now + 1.5 * PLAN.direction[3], **CORE["law"])


@pytest.mark.parametrize(
    ("chosen", "routes", "rank"), [(1, {FIRST}, 1), (2, {FIRST}, 2), (4, {FIRST, SECOND}, 2), ((2, 0), {FIRST}, 1)]
)
def test_channels_are_chosen_by_count_or_number(chosen: Any, routes: set[Route], rank: int) -> None:
    found = laws(channels=chosen)
    assert set(found) == routes
    assert found[FIRST].rank == rank


def test_the_control_is_another_head_of_the_block() -> None:
    found = laws(channels=1, control=True)
    gone = component(0, PLAN.control_head, PLAN.control_probe, PLAN.control_direction)
    torch.testing.assert_close(found[FIRST](Y, A), Y - gone, **CORE["law"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scale": 1.0}, "scale"),
        ({"scale": 1000.0}, "scale"),
        ({"scale": 0.0, "value": 1.0}, "value"),
        ({"channels": 0}, "channels"),
        ({"channels": 5}, "channels"),
        ({"channels": True}, "channels"),
        ({"channels": ()}, "channels"),
        ({"channels": (0, 4)}, "channels"),
        ({"channels": (-1,)}, "channels"),
        ({"channels": 1, "layers": (2,)}, "layers"),
    ],
)
def test_what_the_plan_does_not_have_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        laws(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_in_a_model_it_is_another_singular_value(family: str, scale: float) -> None:
    """W_O edited explicitly, σ_i → γ σ_i, gives the same logits, in float64."""
    plant, edited = (Plant(tiny(family, dtype=torch.float64), tiny_tokenizer()) for _ in range(2))
    plan = fit_channels(plant, "talk", settings=ChannelsSettings(top=6, components=3))
    d = plan.head_width
    done = set()
    for row, place in enumerate(zip(plan.source_layer, plan.source_head, plan.component, strict=True)):
        if place in done:
            continue
        done.add(place)
        layer, h, _ = place
        own = slice(h * d, (h + 1) * d)
        W = edited.model.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight
        # p = W_Oᵀ v, so that W_O − (1 − γ) v pᵀ has γ σ_i in the place of σ_i.
        W.data[:, own] -= (1 - scale) * torch.outer(plan.direction[row].double(), plan.probe[row].double())
    shell = plant.shell()
    term = Channels(plan="talk", channels=6, scale=scale).compile(OnePlan(plan))  # type: ignore[arg-type]
    hook_laws(plant, shell, term.laws, torch.float64)
    ids = torch.tensor(prompts(1))
    with torch.no_grad():
        steered, expected, plain = (m(ids).logits for m in (shell, edited.model, plant.model))
    size = float(expected.abs().max())
    assert float((steered - expected).abs().max()) <= PLANT["jacobian_mixed"] * size
    assert float((plain - expected).abs().max()) > 1e-3 * size


def test_the_edited_matrix_has_the_scaled_singular_value() -> None:
    plant = Plant(tiny("llama", dtype=torch.float64), tiny_tokenizer())
    plan = fit_channels(plant, "talk", settings=ChannelsSettings(top=1))
    layer, h, i, d = plan.source_layer[0], plan.source_head[0], plan.component[0], plan.head_width
    V = (
        plant.linears_at(Site("attn_in", layer))[2].double()
        * plant.model.get_submodule(f"model.layers.{layer}.input_layernorm").weight
    )
    O = plant.linears_at(Site("attn_act", layer))[0].double()[:, h * d : (h + 1) * d]
    V_h = V[(h // 2) * d : (h // 2 + 1) * d]
    whole = torch.linalg.svdvals(O @ V_h)[:d]
    gone = O - torch.outer(plan.direction[0].double(), plan.probe[0].double())
    left = torch.linalg.svdvals(gone @ V_h)[:d]
    expected = torch.cat([whole[:i], whole[i + 1 :], whole.new_zeros(1)])
    torch.testing.assert_close(left, expected, **CORE["float32"])
    assert float(whole[i]) == pytest.approx(float(plan.sigma[0]), rel=1e-5)


def test_the_cap_bounds_what_is_taken() -> None:
    for channels_chosen in (1, 4):
        for route, law in laws(channels=channels_chosen, max_effort=0.05).items():
            effort = (law(Y, A) - Y).norm(dim=-1) / A.norm(dim=-1)
            assert 0.001 < float(effort.max()) <= 0.05 * (1 + CORE["bound"]), route
