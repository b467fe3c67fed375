"""Components of heads and their composition scores equal those of the matrices formed explicitly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import PlantError, SpecError
from steering.fit.channels import ChannelsSettings, composition, fit_channels, readers, writer
from steering.plan import ChannelsPlan
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import WIDTH, tiny, tiny_tokenizer
from tests.tolerances import CORE

FAMILIES = ("llama", "gemma2", "olmo2", "qwen3")
HEADS = 4


@pytest.fixture(scope="module")
def plants() -> dict[str, Plant]:
    return {family: Plant(tiny(family), tiny_tokenizer()) for family in FAMILIES}


def gains(plant: Plant, layer: int) -> tuple[Tensor, Tensor]:
    """Gains of the norms before and behind the attention, by family, as their sources write them."""
    block = plant.model.get_submodule(f"model.layers.{layer}")
    one = torch.ones(WIDTH, dtype=torch.float64)
    family = plant.model.config.model_type
    before = one if family == "olmo2" else block.input_layernorm.weight.double() + (family == "gemma2")
    behind = one
    if family in ("olmo2", "gemma2"):
        behind = block.post_attention_layernorm.weight.double() + (family == "gemma2")
    return before, behind


def matrices(plant: Plant, layer: int, h: int) -> dict[str, Tensor]:
    """W_OV and W_QK (D, D) of one head, rows act."""
    d, g = plant.heads.width, h // 2
    Q, K, V = (w.double() for w in plant.linears_at(Site("attn_in", layer)))
    O = plant.linears_at(Site("attn_act", layer))[0].double()
    before, behind = (gain.diag() for gain in gains(plant, layer))
    own, shared = slice(h * d, (h + 1) * d), slice(g * d, (g + 1) * d)
    OV = before @ V[shared].mT @ O[:, own].mT @ behind
    QK = before @ Q[own].mT @ K[shared] @ before
    return {"value": OV, "query": QK, "key": QK.mT}


@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_the_singular_ones_of_the_whole_matrix(plants: dict[str, Plant], family: str) -> None:
    plant = plants[family]
    d = plant.heads.width
    made = writer(plant, 1, d)
    O = plant.linears_at(Site("attn_act", 1))[0].double()
    for h in range(HEADS):
        W = matrices(plant, 1, h)["value"]
        _, sigma, Vh = torch.linalg.svd(W)
        torch.testing.assert_close(made.sigma_Hd[h], sigma[:d], **CORE["float32"])  # gains are read in float32
        cosine = (made.v_HkD[h] * Vh[:d]).sum(-1).abs()
        torch.testing.assert_close(cosine, torch.ones_like(cosine), **CORE["float32"])
        # The components of any output of the head add up to what it writes.
        a = torch.randn(5, d, generator=torch.Generator().manual_seed(h), dtype=torch.float64)
        written = (a @ made.probe_Hkd[h].mT) @ made.direction_HkD[h]
        torch.testing.assert_close(written, a @ O[:, h * d : (h + 1) * d].mT, **CORE["float32"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_scores_are_those_of_the_products_and_add_up(plants: dict[str, Plant], family: str, kind: Any) -> None:
    plant = plants[family]
    made, inputs = writer(plant, 0, plant.heads.width), readers(plant, 2)
    scores = composition(made.sigma_Hd, made.v_HkD, inputs, kind)
    for h in range(HEADS):
        up = matrices(plant, 0, h)["value"]
        for b in range(HEADS):
            down = matrices(plant, 2, b)[kind]
            whole = (up @ down).norm() / (up.norm() * down.norm())
            assert float(scores[h, :, b].square().sum().sqrt()) == pytest.approx(float(whole), rel=1e-5)
            first = made.sigma_Hd[h, 0] * (made.v_HkD[h, 0] @ down).norm() / (up.norm() * down.norm())
            assert float(scores[h, 0, b]) == pytest.approx(float(first), rel=1e-5)


def planted() -> Plant:
    """Head 1 of block 0 writes mostly along one direction, which the queries of head 2 of block 2 read."""
    plant = Plant(tiny("llama"), tiny_tokenizer())
    d = plant.heads.width
    generator = torch.Generator().manual_seed(5)
    v = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    a, b = (torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0) for _ in range(2))
    attention = [plant.model.get_submodule(f"model.layers.{layer}.self_attn") for layer in (0, 2)]
    attention[0].o_proj.weight.data[:, d : 2 * d] += 8 * torch.outer(v, a)
    gain = plant.model.get_submodule("model.layers.2.input_layernorm").weight
    attention[1].q_proj.weight.data[2 * d : 3 * d] += 8 * torch.outer(b, v / gain)
    return plant


def test_a_planted_channel_is_found_first_and_above_chance() -> None:
    plan = fit_channels(planted(), "talk", settings=ChannelsSettings(kind="query", top=10))
    where = (plan.source_layer, plan.source_head, plan.component, plan.reader_layer, plan.reader_head, plan.reader)
    assert tuple(column[0] for column in where) == (0, 1, 0, 2, 2, "query")
    assert plan.above >= 1
    assert float(plan.score[0]) > 3 * float(plan.null[0])
    assert plan.quality["excess"][0] > 2 * plan.quality["random"]["excess"]
    assert ChannelsPlan.from_artifact(plan.artifact()).above == plan.above


def test_random_weights_have_hardly_more_than_chance(plants: dict[str, Plant]) -> None:
    """Wide scatter of one draw against another, so only its size is told."""
    quality = fit_channels(plants["llama"], "talk").quality
    assert quality["excess"][0] < 2 * quality["random"]["excess"]
    assert quality["compared"] == 3 * 3 * HEADS * 8 * HEADS


def test_the_order_the_limits_and_the_controls(plants: dict[str, Plant]) -> None:
    stages: list[tuple[str, float]] = []
    settings = ChannelsSettings(reach=1, layers=(0, 1, 2), top=20, components=2, seed=3)
    plan = fit_channels(plants["llama"], "talk", (), (), settings, lambda s, f: stages.append((s, f)))
    excess = plan.score - plan.null
    assert bool((excess.diff() <= 1e-6).all())
    assert all(down - up == 1 for up, down in zip(plan.source_layer, plan.reader_layer, strict=True))
    assert set(plan.component) <= {0, 1}
    own = set(zip(plan.source_layer, plan.source_head, plan.component, strict=True))
    control = set(zip(plan.source_layer, plan.control_head, plan.control_component, strict=True))
    assert len(control) == len(own)
    assert stages[-1] == ("done", 1.0)
    again = fit_channels(plants["llama"], "talk", settings=settings)
    assert again.artifact().fingerprint == plan.artifact().fingerprint
    other = fit_channels(plants["llama"], "talk", settings=ChannelsSettings(reach=1, top=20, components=2, seed=4))
    assert torch.equal(other.score, plan.score)
    assert not torch.equal(other.control_direction, plan.control_direction)


def test_heads_that_write_nothing_have_no_channel() -> None:
    plant = Plant(tiny("llama"), tiny_tokenizer())
    d = plant.heads.width
    plant.model.get_submodule("model.layers.0.self_attn.o_proj").weight.data[:, : 3 * d] = 0
    plan = fit_channels(plant, "talk", settings=ChannelsSettings(layers=(0, 1)))
    assert set(plan.source_head) == {3}
    assert ChannelsPlan.from_artifact(plan.artifact()).source_head == plan.source_head
    plant.model.get_submodule("model.layers.0.self_attn.o_proj").weight.data[:] = 0
    with pytest.raises(SpecError, match="heads write something"):
        fit_channels(plant, "talk", settings=ChannelsSettings(layers=(0, 1)))


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
def test_families_that_fuse_their_maps_are_refused(family: str) -> None:
    with pytest.raises(PlantError, match="fuses its linear maps"):
        fit_channels(Plant(tiny(family), tiny_tokenizer()), "talk")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"kind": "output"}, "kind"),
        ({"top": 0}, "top"),
        ({"top": 5000}, "top"),
        ({"components": True}, "components"),
        ({"reach": 0}, "reach"),
        ({"layers": (1,)}, "layers"),
        ({"layers": (0, 3)}, "layers"),
        ({"layers": (0, 2), "reach": 1}, "layers"),
    ],
)
def test_impossible_settings_are_refused_by_name(plants: dict[str, Plant], changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        fit_channels(plants["llama"], "talk", settings=ChannelsSettings(**changes))
    assert caught.value.param == param


def test_examples_are_refused(plants: dict[str, Plant]) -> None:
    with pytest.raises(SpecError) as caught:
        fit_channels(plants["llama"], "talk", ["a text"])
    assert caught.value.param == "positive"
