"""The loss under edits is that of the modules computed by hand, one text at a time; only what is read is counted."""

from __future__ import annotations

import math

import pytest
import torch

from steering.edit import Mask, Sparse
from steering.errors import SpecError
from steering.fit.trial import Row, Trial, calibration, ratio, within
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.calibration import CHAT, TEXTS, loss_by_hand, rows
from tests.plans import orthonormal
from tests.plants import tiny, tiny_tokenizer
from tests.tolerances import CORE


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "gpt_neox", "mixtral"])
def test_an_edited_site_is_a_masked_linear_map(family: str) -> None:
    """At every site that the family has, by threshold, with a rest, and from a later position on."""
    plant = Plant(tiny(family), tiny_tokenizer())
    taps = ("attn_in", "attn_act") if family == "mixtral" else ("attn_in", "attn_act", "mlp_in", "mlp_act")
    texts = rows(plant)
    for first in (1, 3):
        edits, keeps, rests = {}, {}, {}
        for i, tap in enumerate(taps):
            site = Site(tap, i % plant.depth)  # type: ignore[arg-type]
            width = plant.width_of(site)
            weight = torch.rand(width, generator=torch.Generator().manual_seed(i))
            rests[site] = orthonormal(2, width, i).float()
            edits[site] = Sparse.of(weight, threshold=0.5, rest=rests[site])
            keeps[site] = lambda x, w=weight: (x.abs() * w > 0.5).float()
        trial = Trial(plant, texts, list(edits), [first] * len(texts))
        expected = loss_by_hand(plant, texts, keeps, rests, first=first)
        assert trial.loss(edits) == pytest.approx(expected, rel=CORE["perplexity"])
        dense = loss_by_hand(plant, texts, {}, first=first)
        assert trial.loss() == pytest.approx(dense, rel=CORE["perplexity"])
        assert abs(expected - dense) > 5 * CORE["perplexity"] * dense


def test_what_went_is_counted_without_pads(plant: Plant) -> None:
    site, texts = Site("mlp_act", 1), rows(plant)
    weight = torch.ones(plant.width_of(site))
    trial = Trial(plant, texts, [site], [1] * len(texts))
    trial.loss({site: Sparse.of(weight, threshold=0.2)})
    x = torch.cat(capture(plant, [ids for ids, _ in texts], [site])[site])
    assert trial.dropped()[site] == pytest.approx(float((x.abs() <= 0.2).double().mean()), abs=1e-6)


def test_a_block_runs_again_from_its_inputs(plant: Plant) -> None:
    texts = rows(plant)
    trial = Trial(plant, texts, [Site("mlp_out", 1)], [1] * len(texts))
    trial.note_blocks()
    order = sorted(range(len(texts)), key=lambda n: len(texts[n].ids))
    sites = [Site("resid_pre", 1), Site("attn_out", 1), Site("resid_post", 1)]
    found = capture(plant, [texts[n].ids for n in order], sites)
    x, a, out = (torch.cat(found[site]) for site in sites)
    torch.testing.assert_close(trial.block_input(1), x, **CORE["float32"])
    torch.testing.assert_close(trial.block(1), out, **CORE["float32"])
    without_mlp = trial.block(1, {Site("mlp_out", 1): Mask.of(torch.zeros(plant.width))})
    torch.testing.assert_close(without_mlp, x + a, **CORE["float32"])


def test_the_fullest_batch_is_not_that_of_the_shortest_texts(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steering.fit.trial.BATCH_TOKENS", 12)
    texts = [Row([5] * length, 1) for length in (3, 20, 3, 3)]
    trial = Trial(plant, texts, [], [1] * 4)
    assert (trial.batches, trial.fullest) == (2, 1)
    trial.note_blocks(trial.fullest)
    assert len(trial.block_input(0)) == 19


def test_of_a_chat_the_answer_is_read(plant: Plant) -> None:
    _, texts = calibration(plant, [CHAT, TEXTS[0], CHAT[:1]], tokens=500, longest=100)
    chat, text, asked = texts.fitted
    assert texts.measured_on == "fitted"
    assert plant.tokenizer.decode(chat.ids[chat.start :]).startswith("I love")
    assert (text.start, asked.start) == (1, 1)
    trial = Trial(plant, [chat], [], [1])
    assert trial.loss() == pytest.approx(loss_by_hand(plant, [chat], {}), rel=CORE["perplexity"])
    assert texts.tokens["fitted"] == sum(len(ids) - start for ids, start in texts.fitted)


def test_long_texts_keep_their_beginning_and_chats_their_answer(plant: Plant) -> None:
    _, texts = calibration(plant, [TEXTS[0], CHAT], tokens=500, longest=5)
    text, chat = texts.fitted
    assert text.ids == plant.encode(TEXTS[0])[:5]
    assert chat.ids == plant.encode(CHAT)[-5:]
    assert chat.start == 1


def test_every_fifth_is_held_out_of_ten(plant: Plant) -> None:
    _, texts = calibration(plant, TEXTS[:10], tokens=5000, longest=100)
    assert [row.ids for row in texts.measured] == [plant.encode(TEXTS[n]) for n in (0, 5)]
    assert len(texts.fitted) == 8
    assert texts.measured_on == "held-out"


def test_no_more_tokens_than_asked_for() -> None:
    some = [Row([1] * 6, 1), Row([1] * 4, 1), Row([1], 1)]
    assert [len(within(some, tokens)) for tokens in (2, 9, 10, 11)] == [1, 1, 2, 3]


def test_a_text_that_predicts_nothing_is_named(plant: Plant) -> None:
    with pytest.raises(SpecError) as caught:
        calibration(plant, [TEXTS[0], "cat"], tokens=100, longest=100)
    assert caught.value.param == "positive[1]"


def test_a_ratio_is_a_number_that_json_carries() -> None:
    assert ratio(1.0, 0.5) == pytest.approx(math.exp(0.5))
    assert ratio(math.nan, 0.0) == ratio(math.inf, 0.0) == ratio(1e6, 0.0) == pytest.approx(math.exp(80))
