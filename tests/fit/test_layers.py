"""Scores are the cosines of the contributions, an idle module goes first, and the figures are of the model without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steering.errors import SpecError
from steering.fit.layers import LayersSettings, fit_layers, scores
from steering.fit.plans import FITS, fit_plan, settings_of
from steering.fit.trial import calibration, ratio
from steering.plan import LayersPlan
from steering.plant.capture import capture
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.calibration import TEXTS, loss_by_hand, own_texts, rows
from tests.plants import FAMILIES, tiny, tiny_tokenizer
from tests.tolerances import CORE, FIT


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama", layers=4), tiny_tokenizer())


@pytest.fixture(scope="module")
def fitted(plant: Plant) -> LayersPlan:
    return fit_layers(plant, "drops", TEXTS)


def contributions(plant: Plant, family: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The input of a block and what its attention and its MLP add, a post-norm included (tokens, D)."""
    ids = [row.ids for row in rows(plant)]
    sites = [Site("resid_pre", layer), Site("attn_out", layer), Site("mlp_out", layer)]
    x, a, m = (torch.cat(found) for found in capture(plant, ids, sites).values())
    block: Any = blocks_of(plant.model, plant.layout)[layer]
    if family in ("gemma2", "gemma3_text", "olmo2"):
        a, m = block.post_attention_layernorm(a), block.post_feedforward_layernorm(m)
    return x.double(), a.double(), m.double()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_cosines_of_the_contributions(family: str) -> None:
    """In families with post-norms, with attention and MLP side by side, with experts."""
    plant = Plant(tiny(family), tiny_tokenizer())
    score, influence = scores(plant, rows(plant))
    for layer in range(plant.depth):
        x, a, m = contributions(plant, family, layer)
        for found, before, after in (
            (score[0, layer], x, x + a),
            (score[1, layer], x + a, x + a + m),
            (1 - influence[layer], x, x + a + m),
        ):
            expected = ((before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)).mean()
            torch.testing.assert_close(found, expected.float(), **CORE["float32"])


def test_what_adds_nothing_goes_first(plant: Plant) -> None:
    model = tiny("llama", layers=4)
    blocks: Any = model.model.layers
    for linear in (blocks[2].self_attn.o_proj, blocks[1].mlp.down_proj):
        linear.weight.data *= 1e-4
    texts = own_texts(plant, 12)
    plan = fit_layers(Plant(model, tiny_tokenizer()), "drops", texts, (), LayersSettings(most=1))
    assert plan.ordered("attention")[0] == 2
    assert plan.ordered("mlp")[0] == 1
    assert set(plan.order[:2]) == {2, 4 + 1}
    for found in plan.quality["perplexity_ratio"].values():
        assert found == pytest.approx([1.0], abs=1e-3)


def test_orders_follow_from_the_scores(plant: Plant, fitted: LayersPlan) -> None:
    both = torch.cat([fitted.score[0], fitted.score[1]])
    assert list(fitted.order) == sorted(range(8), key=lambda i: -float(both[i]))
    for module, score in zip(("attention", "mlp"), fitted.score, strict=True):
        assert fitted.ordered(module) == sorted(range(4), key=lambda i: -float(score[i]))  # type: ignore[arg-type]
    assert fitted.blocks() == sorted(range(4), key=lambda i: float(fitted.influence[i]))
    assert sorted(fitted.ordered("mlp", control=True)) == list(range(4))
    assert LayersPlan.from_artifact(fitted.artifact()).order == fitted.order


def test_figures_are_of_the_model_without_the_modules(plant: Plant, fitted: LayersPlan) -> None:
    """The linear maps before the stream read nothing: the family has no biases there."""
    measured = calibration(plant, TEXTS, tokens=4096, longest=512)[1].measured
    dense = loss_by_hand(plant, measured, {}, first=0)
    for control, told in ((False, fitted.quality), (True, fitted.quality["random"])):
        for name, order in (
            ("attention", [("attn_act", layer) for layer in fitted.ordered("attention", control=control)]),
            ("mlp", [("mlp_act", layer) for layer in fitted.ordered("mlp", control=control)]),
            (
                "joint",
                [({"attention": "attn_act", "mlp": "mlp_act"}[m], layer) for m, layer in fitted.joint(control=control)],
            ),
        ):
            assert len(told["perplexity_ratio"][name]) == 2
            for count in (1, 2):
                keeps = {Site(tap, layer): torch.zeros_like for tap, layer in order[:count]}  # type: ignore[arg-type]
                expected = ratio(loss_by_hand(plant, measured, keeps, first=0), dense)
                assert told["perplexity_ratio"][name][count - 1] == pytest.approx(expected, abs=FIT["perplexity_ratio"])


def test_a_fit_repeats_itself_and_tells_how_far_it_is(plant: Plant, fitted: LayersPlan) -> None:
    stages: list[tuple[str, float]] = []
    again = fit_layers(plant, "drops", TEXTS, (), None, lambda stage, done: stages.append((stage, done)), lambda: None)
    assert again.artifact().fingerprint == fitted.artifact().fingerprint
    assert stages[-1] == ("done", 1.0)
    assert [done for _, done in stages] == sorted(done for _, done in stages)
    assert fit_layers(plant, "drops", TEXTS, (), LayersSettings(seed=1)).control != fitted.control


def test_it_is_in_the_table_of_fits(plant: Plant) -> None:
    assert FITS["layers"].least == (2, 0)
    plan = fit_plan(plant, "drops", TEXTS, [], settings_of("layers", {"most": 0}, plant))
    assert isinstance(plan, LayersPlan)
    assert plan.quality["perplexity_ratio"]["joint"] == []


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"most": -1}, "most"),
        ({"most": 5}, "most"),
        ({"most": 1.5}, "most"),
        ({"tokens": 1}, "tokens"),
        ({"longest": 0}, "longest"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused_by_name(plant: Plant, given: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        settings_of("layers", given, plant)
    assert caught.value.param == param


def test_a_second_class_is_refused(plant: Plant) -> None:
    with pytest.raises(SpecError) as caught:
        fit_layers(plant, "drops", TEXTS, TEXTS)
    assert caught.value.param == "negative"
