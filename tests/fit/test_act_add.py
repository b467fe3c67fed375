"""The difference of two prompts is that of their states, each run by itself, and zero where they begin alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steering.errors import SpecError
from steering.fit.act_add import ActAddSettings, fit_act_add, pad_token
from steering.fit.plans import checked_rows
from steering.plan import ActAddPlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import WIDTH, WORDS, tiny, tiny_tokenizer
from tests.tolerances import PLANT

LOVE, HATE = "the cat and I love you", "the cat is bad"


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


def test_the_differences_are_those_of_each_prompt_run_alone(plant: Plant) -> None:
    plan = fit_act_add(plant, "love", [LOVE], [HATE], ActAddSettings(layers=(2, 1)))
    assert (plan.layers, plan.difference.shape) == ((1, 2), (2, 7, WIDTH))
    plus, minus = plant.encode(LOVE), plant.encode(HATE)
    minus = minus + [0] * 2  # <pad>: a space is no token here
    for row, layer in enumerate(plan.layers):
        site = Site("resid_pre", layer)
        a, b = (capture(plant, [ids], [site], "all", skip=0)[site][0] for ids in (plus, minus))
        torch.testing.assert_close(plan.difference[row, 3:], (a - b)[3:], **PLANT["float32"])
    assert not plan.difference[:, :3].any()  # <s> the cat: what follows is not seen
    assert (plan.difference[:, 3:].norm(dim=-1) > 0).all()


def test_the_control_is_as_long_at_every_position(plant: Plant) -> None:
    plan = fit_act_add(plant, "love", [LOVE], [HATE])
    torch.testing.assert_close(plan.control.norm(dim=-1), plan.difference.norm(dim=-1))
    cosine = torch.cosine_similarity(plan.control[:, 3:], plan.difference[:, 3:], dim=-1)
    assert float(cosine.abs().mean()) < 0.3
    assert plan.quality["positions"] == 7
    assert len(plan.quality["relative_norm"]) == 3


def test_padding_alike_is_no_difference_before_the_first_block(plant: Plant) -> None:
    """At block 0's input a token knows its own word alone, so equal words cancel wherever they stand."""
    plan = fit_act_add(plant, "love", ["the cat sat"], ["the dog sat"])
    size = plan.difference[0].norm(dim=-1)
    assert [bool(x > 0) for x in size] == [False, False, True, False]


def test_the_same_fit_twice_is_the_same_plan(plant: Plant) -> None:
    first, again = (fit_act_add(plant, "love", [LOVE], [HATE]) for _ in range(2))
    assert first.artifact().fingerprint == again.artifact().fingerprint
    assert ActAddPlan.from_artifact(first.artifact()).depth == 3


def test_what_lengthens_a_prompt_is_one_token(plant: Plant) -> None:
    assert WORDS[pad_token(plant, " ")] == "<pad>"
    assert WORDS[pad_token(plant, "sea")] == "sea"
    for pad in ("sea sky", "zebra"):
        with pytest.raises(SpecError) as caught:
            pad_token(plant, pad)
        assert caught.value.param == "pad"


@pytest.mark.parametrize(
    ("positive", "negative", "param"),
    [
        ([LOVE, LOVE], [HATE], "positive"),
        ([LOVE], [HATE, HATE], "negative"),
        ([], [HATE], "positive"),
        ([LOVE], [LOVE], "positive"),
        ([LOVE], [" "], "negative[0]"),
        (["cat " * 128], [HATE], "positive[0]"),
    ],
)
def test_anything_but_two_short_prompts_is_refused(
    plant: Plant, positive: list[Any], negative: list[Any], param: str
) -> None:
    with pytest.raises(SpecError) as caught:
        fit_act_add(plant, "love", positive, negative)
    assert caught.value.param == param


def test_one_prompt_a_side_is_enough_for_the_table_of_fits(plant: Plant) -> None:
    assert checked_rows(plant, "act_add", ActAddSettings(), [LOVE], [HATE]) == ([LOVE], [HATE])
    for settings, param in ((ActAddSettings(layers=(3,)), "layers"), (ActAddSettings(pad="zebra"), "pad")):
        with pytest.raises(SpecError) as caught:
            settings.for_model(plant)
        assert caught.value.param == param
    with pytest.raises(SpecError) as caught:
        ActAddSettings(pad="")
    assert caught.value.param == "pad"
