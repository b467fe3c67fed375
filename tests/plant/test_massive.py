"""Massive activations are found where weights make them, by the published rule, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from steering.plant.capture import capture
from steering.plant.layouts import LAYOUTS
from steering.plant.massive import TEXTS, Caution, Massive, are_massive
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import FAMILIES, SINK, tiny, tiny_tokenizer, with_sink


def test_the_rule_is_the_published_one() -> None:
    """Token by token and coordinate by coordinate."""
    generator = torch.Generator().manual_seed(1)
    h = 0.2 * torch.randn(7, 11, generator=generator)
    h[0, 3], h[2, 3], h[5, 8], h[6, 1] = 4000.0, -150.0, 99.0, 101.0
    median = float(h.abs().flatten().sort().values[(h.numel() - 1) // 2])
    expected = [[abs(x) > 100 and abs(x) > 1000 * median for x in row] for row in h.tolist()]
    assert are_massive(h).tolist() == expected
    assert are_massive(h).nonzero().tolist()[0] == [0, 3]
    assert h[are_massive(h)].tolist() == [4000.0, -150.0]
    assert h[are_massive(0.5 * h)].tolist() == [4000.0]  # 75 is below 100
    loud = torch.where(h.abs() < 10, 10 * h, h)
    assert h[are_massive(loud)].tolist() == [4000.0]  # 150 is no longer a thousand times the median
    assert not are_massive(torch.zeros(2, 3)).any()


def test_a_sink_that_the_weights_make_is_found() -> None:
    plant = Plant(with_sink(tiny("llama", layers=4)), tiny_tokenizer())
    massive = plant.massive
    assert massive.dims == ((), (SINK,), (SINK,), (SINK,), (SINK,))
    assert massive.first
    assert massive.tokens == ()
    ids = plant.encode(TEXTS[0])
    (h,) = capture(plant, [ids], [Site("resid_post", 0)], skip=0)[Site("resid_post", 0)]
    assert massive.peak >= float(h[0, SINK]) > 1000
    assert not are_massive(h[1:]).any()
    assert plant.massive is massive


def test_other_tokens_that_carry_one_are_named() -> None:
    model = with_sink(tiny("llama", layers=2))
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = model.model.embed_tokens.weight[1]  # every unknown word is a sink too
    massive = Plant(model, tiny_tokenizer()).massive
    assert massive.tokens == (3,)
    assert massive.dims[1] == (SINK,)


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_have_none(family: str) -> None:
    """Also without a tokenizer, on random tokens."""
    plant = Plant(tiny(family))
    assert plant.massive == Massive(((),) * (plant.depth + 1))
    assert plant.caution.is_needed is (family in ("gpt2", "gpt_neox"))


def test_norms_of_the_families() -> None:
    assert {name for name, layout in LAYOUTS.items() if layout.norm == "layer"} == {"gpt2", "gpt_neox"}
    for family in FAMILIES:
        norms = {type(m).__name__ for m in tiny(family).modules() if "Norm" in type(m).__name__}
        assert (norms == {"LayerNorm"}) == (LAYOUTS[family].norm == "layer"), norms


def test_coordinates_of_a_site() -> None:
    """What a block makes is massive behind it, what it takes away before it; its parts may do either."""
    caution = Caution(((), (4,), (4, 7), ()))
    assert caution.at(Site("resid_pre", 0)) == ()
    assert caution.at(Site("resid_post", 0)) == caution.at(Site("resid_pre", 1)) == (4,)
    assert caution.at(Site("mlp_out", 0)) == (4,)
    assert caution.at(Site("attn_out", 1)) == caution.at(Site("mlp_out", 2)) == (4, 7)
    assert caution.at(Site("resid_post", 2)) == ()
    assert caution.at(Site("mlp_act", 1)) == caution.at(Site("final", 0)) == ()
    assert not Caution().is_needed
    assert Caution().at(Site("resid_post", 1)) == ()
