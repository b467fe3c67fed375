"""Neurons are chosen by scores computed apart, beside random ones of the same blocks; massive ones never."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from steering.errors import PlantError, SpecError
from steering.fit import neurons
from steering.fit.concept import held_out
from steering.fit.neurons import NeuronsSettings, Units, fit_neurons
from steering.fit.sensitivity import Answers, draw, eigenscore, prompt_of, sensitivity
from steering.plan import NeuronsPlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.fit.test_concept import NEGATIVE, POSITIVE
from tests.plans import noise
from tests.plants import tiny, tiny_tokenizer
from tests.tolerances import CORE

INNER = 48


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


def fit(plant: Plant, **settings: Any) -> NeuronsPlan:
    return fit_neurons(plant, "tone", POSITIVE, NEGATIVE, NeuronsSettings(**{"skip": 2, "top": 40, **settings}))


def tokens(plant: Plant, texts: list[str], site: Site) -> list[np.ndarray]:
    """What is read of each text at a site."""
    found = capture(plant, [plant.encode(text) for text in texts], [site], "all", skip=2)[site]
    return [x.double().numpy() for x in found]


def fitted(rows: list[Any]) -> list[Any]:
    return [row for row, held in zip(rows, held_out(len(rows)).tolist(), strict=True) if not held]


def test_experts_are_scipy_s(plant: Plant) -> None:
    plan = fit(plant)
    assert (plan.site, plan.layers, plan.spans, len(plan.layer)) == ("mlp_act", (0, 1, 2), (INNER,) * 3, 40)
    every = []
    for layer in plan.layers:
        classes = [tokens(plant, texts, Site("mlp_act", layer)) for texts in (POSITIVE, NEGATIVE)]
        largest = [np.stack([x.max(0) for x in fitted(rows)]) for rows in classes]
        for m in range(INNER):
            statistic = mannwhitneyu(largest[0][:, m], largest[1][:, m]).statistic
            every.append((statistic / (len(largest[0]) * len(largest[1])), layer, m))
    expected = {(layer, m): area for area, layer, m in every}
    places = list(zip(plan.layer.int().tolist(), plan.index.int().tolist(), strict=True))
    assert plan.auroc.tolist() == pytest.approx([expected[place] for place in places])
    assert plan.auroc.tolist() == pytest.approx(sorted((area for area, *_ in every), reverse=True)[:40])
    assert plan.score.tolist() == pytest.approx([area - 0.5 for area in plan.auroc.tolist()])


def test_means_and_deviations_are_over_tokens(plant: Plant) -> None:
    plan = fit(plant)
    for i in (0, 7):
        layer, m = int(plan.layer[i]), int(plan.index[i])
        plus, minus = (
            np.concatenate(tokens(plant, texts, Site("mlp_act", layer)))[:, m] for texts in (POSITIVE, NEGATIVE)
        )
        assert float(plan.positive[i]) == pytest.approx(plus.mean(), rel=1e-4, abs=1e-6)
        assert float(plan.negative[i]) == pytest.approx(minus.mean(), rel=1e-4, abs=1e-6)
        assert float(plan.deviation[i]) == pytest.approx(np.sqrt((plus.var() + minus.var()) / 2), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_mean_difference_counts_what_reaches_the_residual(family: str) -> None:
    plant = Plant(tiny(family), tiny_tokenizer())
    plan = fit(plant, method="mean_difference", layers=(1,))
    means = [
        np.stack([x.mean(0) for x in fitted(tokens(plant, texts, Site("mlp_act", 1)))]).mean(0)
        for texts in (POSITIVE, NEGATIVE)
    ]
    (down,) = plant.linears_at(Site("mlp_act", 1))
    score = (means[0] - means[1]) * down.double().norm(dim=0).numpy()
    chosen = plan.index.long().numpy()
    np.testing.assert_allclose(plan.score.double().numpy(), score[chosen], rtol=1e-4, atol=1e-7)
    assert np.all(np.diff(np.abs(score[chosen])) <= 1e-7)
    assert float(plan.score.min()) < 0 < float(plan.score.max())


def test_the_control_is_of_the_same_blocks_and_of_other_units(plant: Plant) -> None:
    plan = fit(plant, top=20)
    chosen = set(zip(plan.layer.tolist(), plan.index.tolist(), strict=True))
    control = set(zip(plan.layer.tolist(), plan.control.tolist(), strict=True))
    assert len(control) == 20
    assert not chosen & control
    assert set(plan.quality) >= {"measured_on", "auroc", "random"}
    assert plan.quality["measured_on"] == "held-out"


def units(score: list[float], massive: list[int]) -> Units:
    n = len(score)
    zero = torch.zeros(n, dtype=torch.float64)
    flags = zero.clone()
    flags[massive] = 1
    return Units(
        zero, torch.arange(n, dtype=torch.float64), torch.tensor(score).double(), zero, zero, zero, zero, zero, flags
    )


def test_massive_units_are_neither_chosen_nor_drawn() -> None:
    known = units([0.4, 0.3, 0.2, 0.1, -0.4, 0.0], [0, 5])
    chosen = neurons._chosen(known, NeuronsSettings(top=2))
    assert chosen.tolist() == [1, 2]
    for seed in range(8):
        control = neurons._control(known, chosen, torch.Generator().manual_seed(seed))
        assert sorted(control.tolist()) == [3, 4]
    assert neurons._chosen(known, NeuronsSettings(method="mean_difference", top=2)).tolist() == [4, 1]
    with pytest.raises(SpecError, match="some unit differs"):
        neurons._chosen(units([-0.4, 0.3], [1]), NeuronsSettings())


def test_blocks_read_in_groups_give_the_same_plan(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(plant)
    assert fit(plant).artifact().fingerprint == whole.artifact().fingerprint
    monkeypatch.setattr(neurons, "GROUP_BYTES", 1)
    stages: list[tuple[str, float]] = []
    settings = NeuronsSettings(skip=2, top=40)
    grouped = fit_neurons(plant, "tone", POSITIVE, NEGATIVE, settings, lambda s, f: stages.append((s, f)))
    assert grouped.artifact().fingerprint == whole.artifact().fingerprint
    assert stages[-1] == ("done", 1.0)
    assert [f for _, f in stages] == sorted(f for _, f in stages)
    assert NeuronsPlan.from_artifact(grouped.artifact()).method == "auroc"


# Sensitivity


def test_sensitivity_and_eigenscore_are_numpy_s() -> None:
    e = noise(5, 7, seed=1)
    expected = [np.var(e[:, i].numpy()) * np.abs(np.diff(e[:, i].numpy())).sum() for i in range(7)]
    torch.testing.assert_close(sensitivity(e), torch.tensor(expected, dtype=torch.float64), **CORE["law"])
    covariance = np.cov(e.numpy()) + 1e-3 * np.eye(5)
    assert eigenscore(e) == pytest.approx(np.linalg.slogdet(covariance)[1] / (5 * np.log(10)))
    assert eigenscore(e[:1].expand(5, 7)) < eigenscore(e)


def test_answers_repeat_with_their_seed_and_end_where_they_end(plant: Plant) -> None:
    ids = plant.encode(POSITIVE[0])
    how = Answers(count=4, length=12, temperature=1.0, seed=0)
    first, again, other = (
        draw(plant, plant.shell(), ids, how, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    end = plant.model.generation_config.eos_token_id
    for answer in first + other:
        assert 1 <= len(answer) <= 12
        assert end not in answer[:-1]
        assert len(answer) == 12 or answer[-1] == end


def test_what_is_answered_is_the_prompt(plant: Plant) -> None:
    chat = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    assert prompt_of(plant, chat) == plant.encode(chat[:1]) == prompt_of(plant, chat[:1])
    assert prompt_of(plant, "the cat") == plant.encode("the cat")


@pytest.mark.parametrize("source", ["samples", "positions"])
def test_sensitivity_reads_the_block_before_the_last(plant: Plant, source: str) -> None:
    plan = fit(plant, method="sensitivity", source=source, top=None, samples=3, tokens=4)
    assert (plan.site, plan.layers, len(plan.layer)) == ("resid_post", (1,), 32 // 5)
    assert (plan.score.diff() <= 0).all()
    again = fit(plant, method="sensitivity", source=source, top=None, samples=3, tokens=4)
    assert again.artifact().fingerprint == plan.artifact().fingerprint
    assert ("eigenscore" in plan.quality) is (source == "samples")
    if source == "positions":
        assert plan.quality["sensitivity_share"] > plan.quality["random"]["sensitivity_share"]
        rows = fitted(tokens(plant, POSITIVE, Site("resid_post", 1)))
        V = np.mean([np.var(h, axis=0) * np.abs(np.diff(h, axis=0)).sum(0) for h in rows], axis=0)
        np.testing.assert_allclose(plan.score.numpy(), np.sort(V)[::-1][: len(plan.score)], rtol=1e-4)


def test_units_that_vary_no_more_than_random_ones_are_told(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {"method": "sensitivity", "source": "positions", "top": None}
    assert "warning" not in fit(plant, **told).quality
    monkeypatch.setattr(neurons, "_control", lambda units, chosen, generator: chosen)
    assert "vary no more" in fit(plant, **told).quality["warning"]


# Refusals


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"method": "largest"}, "method"),
        ({"site": "attn_act"}, "site"),
        ({"source": "thin air"}, "source"),
        ({"top": 0}, "top"),
        ({"top": 65_537}, "top"),
        ({"top": True}, "top"),
        ({"samples": 1}, "samples"),
        ({"tokens": None}, "tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"positions": "first"}, "positions"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        NeuronsSettings(**changes)
    assert caught.value.param == param


def test_what_the_model_does_not_have_is_refused_by_name(plant: Plant) -> None:
    for layers in ((), (3,), (-1, 0)):
        with pytest.raises(SpecError) as caught:
            fit(plant, layers=layers)
        assert caught.value.param == "layers"
    with pytest.raises(PlantError, match="mixes experts"):
        fit(Plant(tiny("mixtral"), tiny_tokenizer()))
    with pytest.raises(SpecError, match="at least two positions") as caught:
        fit(plant, method="sensitivity", source="positions", positions="last")
    assert caught.value.param == "positive[0]"


def test_answers_that_would_take_hours_are_refused(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "MAX_STEPS", 4 * len(POSITIVE))
    fit(plant, method="sensitivity", samples=2, tokens=4)
    with pytest.raises(SpecError, match="at most 4 for 12 prompts") as caught:
        fit(plant, method="sensitivity", samples=2, tokens=5)
    assert caught.value.param == "tokens"
    fit(plant, method="sensitivity", source="positions", tokens=5)


def test_equal_classes_are_refused(plant: Plant) -> None:
    with pytest.raises(SpecError, match="some unit differs") as caught:
        fit_neurons(plant, "tone", POSITIVE[:4], POSITIVE[:4], NeuronsSettings(skip=2))
    assert caught.value.param == "positive"
